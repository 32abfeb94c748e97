"""A view, and a function that the application calls."""

from alembic import op
from statements import SUMMARY

revision = "0002"
down_revision = "0001"


def upgrade():
    op.execute(SUMMARY.format("full_name"))
    op.execute(
        "CREATE FUNCTION pay(wanted bigint) RETURNS bigint LANGUAGE sql AS"
        " $$ UPDATE orders SET state = 'paid' WHERE id = wanted RETURNING id $$"
    )


def downgrade():
    op.execute("DROP FUNCTION pay(bigint)")
    op.execute("DROP VIEW summary")
