"""The tables that were there first."""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            "Category",
            [
                ("id", models.BigAutoField(primary_key=True, auto_created=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=60, unique=True)),
                ("parent", models.ForeignKey(null=True, on_delete=django.db.models.deletion.CASCADE, to="shop.category")),
            ],
        ),
        migrations.CreateModel(
            "Product",
            [
                ("id", models.BigAutoField(primary_key=True, auto_created=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=100)),
                ("category", models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to="shop.category")),
                ("price", models.DecimalField(max_digits=8, decimal_places=2)),
            ],
        ),
        migrations.RunSQL(
            "INSERT INTO shop_category (name) SELECT 'category ' || n FROM generate_series(1, 10) n;"
            "INSERT INTO shop_product (name, category_id, price)"
            " SELECT 'product ' || n, 1 + n % 10, round((random() * 100)::numeric, 2) FROM generate_series(1, 120) n",
            "LOCK TABLE shop_product, shop_category IN SHARE ROW EXCLUSIVE MODE; DELETE FROM shop_product; DELETE FROM shop_category; SET CONSTRAINTS ALL IMMEDIATE",
        ),
    ]
