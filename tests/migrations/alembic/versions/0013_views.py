"""A column changes its type under a view and a materialized view."""

import sqlalchemy as sa
from alembic import op
from statements import SUMMARY

revision = "0013"
down_revision = "0012"


def upgrade():
    op.execute("DROP VIEW summary")
    op.alter_column("orders", "total", type_=sa.Numeric(12, 3), existing_nullable=False)
    op.add_column(
        "orders", sa.Column("whole", sa.Numeric(14, 3), sa.Computed("total * quantity", persisted=True))
    )
    op.execute(SUMMARY.format("display_name"))
    op.execute("COMMENT ON VIEW summary IS 'who bought how much'")
    op.execute("CREATE MATERIALIZED VIEW sales AS SELECT state, count(*) AS orders, sum(whole) AS total FROM orders GROUP BY state")
    op.execute("CREATE UNIQUE INDEX sales_by_state ON sales (state)")
    op.execute("REFRESH MATERIALIZED VIEW sales")


def downgrade():
    op.execute("DROP MATERIALIZED VIEW sales")
    op.execute("DROP VIEW summary")
    op.drop_column("orders", "whole")
    op.alter_column("orders", "total", type_=sa.Numeric(10, 2), existing_nullable=False)
    op.execute(SUMMARY.format("display_name"))
