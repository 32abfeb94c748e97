"""Indexes that are built while the application writes."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade():
    with op.get_context().autocommit_block():
        for index in ("ix_orders_state", "ix_orders_open"):
            op.drop_index(index, postgresql_concurrently=True, if_exists=True)
        op.create_index("ix_orders_state", "orders", ["state"], postgresql_concurrently=True)
        op.create_index(
            "ix_orders_open",
            "orders",
            ["person_id"],
            postgresql_concurrently=True,
            postgresql_where=sa.text("state = 'new'"),
        )


def downgrade():
    with op.get_context().autocommit_block():
        op.drop_index("ix_orders_open", postgresql_concurrently=True, if_exists=True)
        op.drop_index("ix_orders_state", postgresql_concurrently=True, if_exists=True)
