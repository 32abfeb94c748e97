//! The `pgtandem` command; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    pgtandem::cli::run()
}
