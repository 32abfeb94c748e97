//! What the databases say of themselves: tables and their keys, transaction snapshots,
//! privileges, and whether two databases hold the same rows and definitions.
//!
//! Used by the journal, the applier and `schema diff`, and later by `check`. Nothing here
//! changes a database.

pub mod compare;
mod databases;
pub mod definitions;
pub mod objects;
pub mod privileges;
pub mod quote;
pub mod snapshot;
pub mod table;

pub use databases::databases;

/// A table's, index's or type's OID; it means something only in the database it was read from.
pub type Oid = u32;

/// Settings under which a row is written as text alike on every server and in every session:
/// the values that the capture functions pin (`settings_of` in capture.sql), and a search path
/// that makes the server qualify every name outside pg_catalog.
pub const PINNED_SETTINGS: &str = "\
    SET search_path = pg_catalog; SET DateStyle = 'ISO, YMD'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres'; \
    SET extra_float_digits = 1; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET quote_all_identifiers = off; \
    SET xmloption = content;";
