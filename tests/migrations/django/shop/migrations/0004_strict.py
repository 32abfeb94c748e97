"""What holds from here on."""

from django.contrib.postgres.operations import AddConstraintNotValid, ValidateConstraint
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0003_concurrently")]
    operations = [
        migrations.RunSQL(
            "LOCK TABLE shop_product IN SHARE ROW EXCLUSIVE MODE;"
            " UPDATE shop_product SET slug = 'late-' || id WHERE slug IS NULL; SET CONSTRAINTS ALL IMMEDIATE",
            migrations.RunSQL.noop,
        ),
        migrations.AlterField("product", "slug", models.SlugField(max_length=120, unique=True)),
        AddConstraintNotValid(
            "product", models.CheckConstraint(condition=models.Q(price__gte=0), name="product_price")
        ),
        ValidateConstraint("product", "product_price"),
    ]
