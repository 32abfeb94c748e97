"""people.region, first step: a column that may be null."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade():
    op.add_column("people", sa.Column("region", sa.String(20)))
    op.alter_column("people", "region", server_default="nowhere")


def downgrade():
    op.drop_column("people", "region")
