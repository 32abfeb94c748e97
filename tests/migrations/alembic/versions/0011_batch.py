"""Batch operations: several changes in one go, and a table made anew."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

from sqlalchemy.dialects.postgresql import JSONB


def upgrade():
    with op.batch_alter_table("orders") as batch:
        batch.alter_column("note", new_column_name="remark")
        batch.add_column(sa.Column("quantity", sa.Integer, nullable=False, server_default=sa.text("1")))
        batch.create_check_constraint("ck_orders_quantity", "quantity > 0")
    with op.batch_alter_table("settings", recreate="always") as batch:
        batch.add_column(sa.Column("version", sa.Integer, nullable=False, server_default=sa.text("1")))
    op.alter_column("settings", "value", type_=JSONB, postgresql_using="value::jsonb")


def downgrade():
    op.alter_column("settings", "value", type_=sa.Text, postgresql_using="value::text")
    with op.batch_alter_table("settings", recreate="always") as batch:
        batch.drop_column("version")
    with op.batch_alter_table("orders") as batch:
        batch.drop_constraint("ck_orders_quantity", type_="check")
        batch.drop_column("quantity")
        batch.alter_column("remark", new_column_name="note")
