from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models.functions import Now


class Category(models.Model):
    name = models.CharField(max_length=60, unique=True)
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE)


class Product(models.Model):
    title = models.CharField(max_length=100)
    category = models.ForeignKey(Category, on_delete=models.CASCADE)
    tags = ArrayField(models.CharField(max_length=20), default=list)
    price = models.DecimalField(max_digits=12, decimal_places=3)
    added = models.DateTimeField(db_default=Now())
    slug = models.SlugField(max_length=120, unique=True)
    fans = models.ManyToManyField(settings.AUTH_USER_MODEL)

    class Meta:
        indexes = [
            GinIndex(fields=["tags"], name="product_tags"),
            models.Index(fields=["added"], name="product_added"),
        ]
        constraints = [models.CheckConstraint(condition=models.Q(price__gte=0), name="product_price")]
