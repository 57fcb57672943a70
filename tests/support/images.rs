//! An image directory that looks complete, where no engine can make one.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Writes what CRIU writes last, with nothing in it.
pub(crate) fn pretend(dir: &Path) -> io::Result<()> {
    let mut inventory = File::create(dir.join("inventory.img"))?;
    // The number that such a file begins with, the length of its one entry, and that.
    inventory.write_all(&0x5831_3116_u32.to_le_bytes())?;
    inventory.write_all(&2_u32.to_le_bytes())?;
    inventory.write_all(&[8, 1])
}
