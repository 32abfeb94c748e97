"""The tables that were there first."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table(
        "people",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("full_name", sa.String(80), nullable=False),
        sa.Column("email", sa.String(120)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        comment="who buys",
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("person_id", sa.BigInteger, sa.ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
        sa.Column("state", sa.Enum("new", "paid", name="order_state"), nullable=False, server_default="new"),
        sa.Column("total", sa.Numeric(10, 2), nullable=False),
        sa.Column("note", sa.Text),
    )
    settings = op.create_table(
        "settings",
        sa.Column("key", sa.String(40), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.bulk_insert(settings, [{"key": f"setting {n}", "value": f'{{"n": {n}}}'} for n in range(20)])
    op.execute(
        "INSERT INTO people (full_name, email)"
        " SELECT 'Person ' || n, nullif('p' || n || '@example.org', 'p7@example.org') FROM generate_series(1, 200) n"
    )
    op.execute(
        "INSERT INTO orders (person_id, total, note)"
        " SELECT id, round((random() * 100)::numeric, 2), md5(random()::text) FROM people, generate_series(1, 2)"
    )


def downgrade():
    op.drop_table("settings")
    op.drop_table("orders")
    op.drop_table("people")
    op.execute("DROP TYPE order_state")
