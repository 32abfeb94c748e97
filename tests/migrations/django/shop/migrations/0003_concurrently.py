"""Outside of a transaction: indexes that are built while the application writes."""

import django.contrib.postgres.indexes
from django.contrib.postgres.operations import AddIndexConcurrently
from django.db import migrations, models


class Migration(migrations.Migration):
    atomic = False
    dependencies = [("shop", "0002_grown")]
    operations = [
        AddIndexConcurrently("product", django.contrib.postgres.indexes.GinIndex(fields=["tags"], name="product_tags")),
        AddIndexConcurrently("product", models.Index(fields=["added"], name="product_added")),
    ]
