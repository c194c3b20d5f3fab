//! Sizes as people read and write them: binary units, as storage of virtual machines counts.

use std::fmt;
use std::str::FromStr;

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// A number of bytes that prints and parses with binary units (`1.5 GiB`, `64KiB`, `512`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no size: write a whole number and a unit, such as 64KiB, 10GiB or 2TiB")]
pub struct ParseByteSizeError {
    /// What was given.
    pub text: String,
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = UNITS.into_iter().find(|&(_, factor)| self.0 >= factor).unwrap_or(("B", 1));
        if factor == 1 || self.0.is_multiple_of(factor) {
            return f.pad(&format!("{} {unit}", self.0 / factor));
        }
        // Floating point only for the eye: at most two digits after the point are shown.
        f.pad(&format!("{:.2} {unit}", self.0 as f64 / factor as f64))
    }
}

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseByteSizeError { text: text.to_owned() };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit.trim();
        let factor = UNITS
            .into_iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit) || (unit.is_empty() && *name == "B"))
            .map(|(_, factor)| factor)
            .ok_or_else(error)?;
        number.checked_mul(factor).map(ByteSize).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_print_in_the_largest_unit_that_fits() {
        for (bytes, text) in [(0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (1536, "1.50 KiB"), (2040 << 30, "1.99 TiB")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn sizes_parse_with_and_without_a_unit() {
        for (text, bytes) in [("512", 512), ("64KiB", 65_536), (" 2 tib ", 2 << 40)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
        for text in ["", "KiB", "1.5GiB", "-1", "20000000 TiB", "3 apples"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
