"""people.region, second step: the rows that are there, in batches."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

BATCH = sa.text(
    "UPDATE people SET region = 'region ' || id % 7 WHERE id IN"
    " (SELECT id FROM people WHERE region IS NULL ORDER BY id LIMIT 40 FOR UPDATE SKIP LOCKED)"
)


def upgrade():
    with op.get_context().autocommit_block():
        connection = op.get_bind()
        while connection.scalar(sa.text("SELECT EXISTS (SELECT FROM people WHERE region IS NULL)")):
            connection.execute(BATCH)


def downgrade():
    pass
