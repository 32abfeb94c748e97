"""people.region, third step: NOT NULL, by a constraint that is validated without a long lock."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade():
    op.execute("ALTER TABLE people ADD CONSTRAINT region_is_there CHECK (region IS NOT NULL) NOT VALID")
    op.execute("ALTER TABLE people VALIDATE CONSTRAINT region_is_there")
    op.alter_column("people", "region", nullable=False)
    op.drop_constraint("region_is_there", "people")


def downgrade():
    op.alter_column("people", "region", nullable=True)
