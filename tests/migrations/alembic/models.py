"""What the last migration arrives at, for `alembic check`."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Person(Base):
    __tablename__ = "people"
    __table_args__ = {"comment": "who buys"}
    id = Column(BigInteger, Identity(), primary_key=True)
    created_at = Column(DateTime(timezone=True), nullable=False, server_default=text("now()"))
    region = Column(String(20), nullable=False, server_default=text("'nowhere'"))
    display_name = Column(String(80), nullable=False)
    token = Column(UUID, nullable=False, server_default=text("gen_random_uuid()"))
    profile = Column(JSONB)


class Contact(Base):
    __tablename__ = "contacts"
    person_id = Column(ForeignKey("people.id", ondelete="CASCADE"), primary_key=True)
    email = Column(String(120))


class Order(Base):
    __tablename__ = "orders"
    id = Column(BigInteger, primary_key=True)
    person_id = Column(ForeignKey("people.id", ondelete="CASCADE"), nullable=False)
    state = Column(Enum("new", "paid", "shipped", name="order_state"), nullable=False, server_default=text("'new'"))
    total = Column(Numeric(12, 3), nullable=False)
    remark = Column(Text)
    quantity = Column(Integer, nullable=False, server_default=text("1"))
    whole = Column(Numeric(14, 3), Computed("total * quantity", persisted=True))
    __table_args__ = (
        CheckConstraint("quantity > 0", name="quantity"),
        Index("ix_orders_state", "state"),
        Index("ix_orders_open", "person_id", postgresql_where=text("state = 'new'::order_state")),
    )


class Setting(Base):
    __tablename__ = "settings"
    key = Column(String(40), primary_key=True)
    value = Column(JSONB, nullable=False)
    version = Column(Integer, nullable=False, server_default=text("1"))


class Audit(Base):
    __tablename__ = "audit_log"
    id = Column(BigInteger, Identity(), primary_key=True)
    at = Column(DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()"))
    what = Column(Text, nullable=False)
