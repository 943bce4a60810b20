//! What the fuzz targets drive of what is private here. Only with the feature `fuzzing`; decides nothing itself.

use super::{Format, parse};
use crate::store::TokenRecord;

/// Reads the text of a token file. `Err`: all that is said of what is wrong.
pub fn read_tokens(text: &str, json: bool) -> Result<Vec<TokenRecord>, String> {
    let format = if json { Format::Json } else { Format::Toml };
    parse(text, format).map(|table| table.into_values().collect()).map_err(|why| format!("{why}\n{why:?}"))
}
