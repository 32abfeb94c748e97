"""Columns and tables of every kind, rows that Python computes, constraints that wait."""

import django.contrib.postgres.fields
from django.conf import settings
from django.db import migrations, models
from django.db.models.functions import Now
from django.utils.text import slugify


def give_slugs(apps, schema_editor):
    for product in apps.get_model("shop", "Product").objects.iterator():
        product.slug = slugify(f"{product.title} {product.pk}")
        product.save(update_fields=["slug"])


class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial"), migrations.swappable_dependency(settings.AUTH_USER_MODEL)]
    operations = [
        migrations.RenameField("product", "name", "title"),
        migrations.AlterField("product", "price", models.DecimalField(max_digits=12, decimal_places=3)),
        migrations.AddField(
            "product",
            "tags",
            django.contrib.postgres.fields.ArrayField(models.CharField(max_length=20), default=list),
        ),
        migrations.AddField("product", "added", models.DateTimeField(db_default=Now())),
        migrations.AddField("product", "slug", models.SlugField(max_length=120, null=True)),
        migrations.AddField("product", "fans", models.ManyToManyField(settings.AUTH_USER_MODEL)),
        migrations.RunPython(give_slugs, migrations.RunPython.noop),
        # The rows are new, so their foreign keys wait to be looked at, and no index can be built.
        migrations.RunSQL("SET CONSTRAINTS ALL IMMEDIATE", migrations.RunSQL.noop),
    ]
