//! Recovery keys: 256 random bits that open a key slot, as text that people can print, read and type.
//!
//! ```text
//! XVRK-GGGGGGGG-GGGGGGGG-... (nine groups of eight characters)
//! ```
//! Each of the first eight groups carries four bytes of the key and a check byte of its own, which depends on the
//! group's place: a typing error is found in the group where it is. The ninth is a check over the whole key.

use std::fmt;

use ring::digest;
use zeroize::Zeroizing;

use crate::keys::random_array;
use crate::{FormatError, Secret};

const PREFIX: &[u8; 4] = b"XVRK";
/// Crockford's base 32: no I, L, O and U, so that nothing is mistaken for a digit.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const GROUP_CHARACTERS: usize = 8;
const GROUPS: u8 = 9;
const CHECK_LABEL: &[u8] = b"xenvault recovery key";

/// A key of 256 random bits that stands in for a passphrase.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(redacted)")
    }
}

/// What is wrong with the text of a recovery key. Holds nothing of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecoveryKeyError {
    /// Too few or too many groups.
    #[error("a recovery key has {GROUPS} groups of {GROUP_CHARACTERS} characters after XVRK, this text has {found}")]
    Groups {
        /// Groups found.
        found: usize,
    },
    /// Characters are missing in a group, or too many.
    #[error("group {group} of the recovery key has {found} characters instead of {GROUP_CHARACTERS}")]
    Length {
        /// Which group, counted from 1.
        group: u8,
        /// Characters found.
        found: usize,
    },
    /// A character that is in no recovery key.
    #[error("group {group} of the recovery key has a character that none can have, at place {place} of the group")]
    Character {
        /// Which group, counted from 1.
        group: u8,
        /// Which character of the group, counted from 1.
        place: usize,
    },
    /// The check of a group does not fit.
    #[error("group {group} of the recovery key has a typing error")]
    Group {
        /// Which group, counted from 1.
        group: u8,
    },
    /// Each group fits by itself, and they do not fit together.
    #[error(
        "the groups of the recovery key do not belong together: one is of another key, or the last one has a typing error"
    )]
    Whole,
}

impl RecoveryKey {
    /// Draws a new key.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the system gives no random bytes.
    pub fn random() -> Result<Self, FormatError> {
        random_array().map(Self::from_bytes)
    }

    /// The key with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// The text, one line, to be printed or written down.
    pub fn to_text(&self) -> Zeroizing<String> {
        let (words, _) = self.0.as_chunks::<4>();
        let mut text = Zeroizing::new(String::with_capacity(5 + 9 * usize::from(GROUPS)));
        text.extend(PREFIX.iter().map(|&byte| char::from(byte)));
        for (group, word) in (1..GROUPS).zip(words) {
            put_group(&mut text, u64::from(u32::from_be_bytes(*word)) << 8 | u64::from(check(group, word)));
        }
        put_group(&mut text, self.check_of_all());
        text
    }

    /// Reads the text: in capitals or small letters, with hyphens, spaces or nothing between the groups; I and L are
    /// read as 1, O as 0.
    ///
    /// # Errors
    /// [`RecoveryKeyError`], with the first group that is wrong.
    pub fn from_text(text: &str) -> Result<Self, RecoveryKeyError> {
        let mut words = text.split(is_separator).filter(|word| !word.is_empty());
        let rest =
            words.next().and_then(|word| strip_prefix(word.as_bytes())).ok_or(RecoveryKeyError::Groups { found: 0 })?;
        let mut groups: Vec<&[u8]> = words.map(str::as_bytes).collect();
        if !rest.is_empty() {
            groups.insert(0, rest);
        }
        // Without separators the places tell the groups.
        if let [all] = groups[..] {
            groups = all.chunks(GROUP_CHARACTERS).collect();
        }
        if groups.len() != usize::from(GROUPS) {
            return Err(RecoveryKeyError::Groups { found: groups.len() });
        }
        let mut key = Zeroizing::new([0; 32]);
        let (words, _) = key.as_chunks_mut::<4>();
        let mut last = 0;
        for (number, characters) in (1..=GROUPS).zip(&groups) {
            let value = group(number, characters)?;
            let [.., a, b, c, d, found] = value.to_be_bytes();
            match words.get_mut(usize::from(number) - 1) {
                Some(word) if check(number, &[a, b, c, d]) == found => *word = [a, b, c, d],
                Some(_) => return Err(RecoveryKeyError::Group { group: number }),
                None => last = value,
            }
        }
        let key = Self(key);
        if key.check_of_all() == last { Ok(key) } else { Err(RecoveryKeyError::Whole) }
    }

    /// Whether a text is meant as a recovery key, right or mistyped: no passphrase begins like that.
    pub fn is_meant_by(secret: &Secret) -> bool {
        let text = secret.expose().trim_ascii_start();
        strip_prefix(text).is_some_and(|rest| rest.first().is_some_and(|&byte| is_separator(byte.into())))
    }

    /// The first 40 bits of a hash of the key.
    fn check_of_all(&self) -> u64 {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(CHECK_LABEL);
        context.update(&*self.0);
        let hash = context.finish();
        hash.as_ref().iter().take(5).fold(0, |value, &byte| value << 8 | u64::from(byte))
    }
}

fn is_separator(character: char) -> bool {
    character == '-' || character.is_ascii_whitespace()
}

fn strip_prefix(text: &[u8]) -> Option<&[u8]> {
    let (first, rest) = text.split_at_checked(PREFIX.len())?;
    first.eq_ignore_ascii_case(PREFIX).then_some(rest)
}

fn put_group(text: &mut String, value: u64) {
    text.push('-');
    for shift in (0..GROUP_CHARACTERS).rev() {
        let digit = usize::try_from(value >> (5 * shift) & 31).unwrap_or_default();
        text.extend(ALPHABET.get(digit).map(|&byte| char::from(byte)));
    }
}

/// The 40 bits of a group.
fn group(group: u8, characters: &[u8]) -> Result<u64, RecoveryKeyError> {
    let count = std::str::from_utf8(characters).map_or(characters.len(), |text| text.chars().count());
    let mut value = 0;
    for (at, character) in characters.iter().enumerate() {
        let plain = match character.to_ascii_uppercase() {
            b'I' | b'L' => b'1',
            b'O' => b'0',
            other => other,
        };
        let digit = ALPHABET.iter().position(|&known| known == plain);
        let digit = digit.ok_or(RecoveryKeyError::Character { group, place: at + 1 })?;
        value = value << 5 & 0xff_ffff_ffff | digit as u64;
    }
    if count == GROUP_CHARACTERS { Ok(value) } else { Err(RecoveryKeyError::Length { group, found: count }) }
}

/// CRC-8 (polynomial x^8 + x^2 + x + 1) of the group's number and its bytes. It finds each change of one character and
/// each exchange of two within a group, and groups that have changed places.
fn check(group: u8, word: &[u8; 4]) -> u8 {
    std::iter::once(&group).chain(word).fold(0, |crc, byte| {
        (0..8).fold(crc ^ byte, |crc: u8, _| if crc & 0x80 == 0 { crc << 1 } else { crc << 1 ^ 0x07 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> RecoveryKey {
        let mut bytes = [0; 32];
        (0..32).zip(&mut bytes).for_each(|(number, byte)| *byte = number * 7 + 3);
        RecoveryKey::from_bytes(bytes)
    }

    #[test]
    fn the_text_of_a_key_is_fixed() {
        let text = key().to_text();
        crate::testing::golden("recovery-key", text.as_bytes());
        assert_eq!(text.len(), 4 + 9 * 9);
        assert!(RecoveryKey::is_meant_by(&Secret::new(text.as_bytes())));
        assert_eq!(format!("{:?}", key()), "RecoveryKey(redacted)");
    }

    #[test]
    fn the_check_of_a_group_is_the_crc_8_of_the_catalogues() {
        // CRC-8/SMBUS of "123456789" is 0xf4.
        let (a, rest) = (b'1', *b"2345");
        let first = check(a, &rest);
        let all = b"6789".iter().fold(first, |crc, byte| {
            (0..8).fold(crc ^ byte, |crc: u8, _| if crc & 0x80 == 0 { crc << 1 } else { crc << 1 ^ 0x07 })
        });
        assert_eq!(all, 0xf4);
    }

    #[test]
    fn people_may_write_it_in_many_ways() {
        let text = key().to_text();
        for written in [
            text.to_lowercase(),
            text.replace('-', " "),
            text.replacen('-', " ", 1).replace('-', ""),
            text.replace('-', ""),
            text.replace('-', " - "),
            text.replace('0', "O").replace('1', "l"),
            format!("  {}\n", &*text),
        ] {
            assert_eq!(RecoveryKey::from_text(&written), Ok(key()), "{written}");
        }
    }

    /// Group `number`, from 1, with its text changed.
    fn with_group(number: usize, change: impl FnOnce(&mut Vec<char>)) -> String {
        let text = key().to_text();
        let mut words: Vec<String> = text.split('-').map(str::to_owned).collect();
        let mut characters = words[number].chars().collect();
        change(&mut characters);
        words[number] = characters.into_iter().collect();
        words.join("-")
    }

    #[test]
    fn every_change_of_one_character_and_every_exchange_of_two_names_the_group() {
        let wrong = |number: u8| match number {
            GROUPS => RecoveryKeyError::Whole,
            group => RecoveryKeyError::Group { group },
        };
        for number in 1..=GROUPS {
            for at in 0..GROUP_CHARACTERS {
                for &other in ALPHABET {
                    let text = with_group(number.into(), |group| group[at] = other.into());
                    if text != *key().to_text() {
                        assert_eq!(RecoveryKey::from_text(&text), Err(wrong(number)), "{text}");
                    }
                }
                for to in 0..at {
                    let text = with_group(number.into(), |group| group.swap(at, to));
                    if text != *key().to_text() {
                        assert_eq!(RecoveryKey::from_text(&text), Err(wrong(number)), "{text}");
                    }
                }
                let text = with_group(number.into(), |group| _ = group.remove(at));
                assert_eq!(RecoveryKey::from_text(&text), Err(RecoveryKeyError::Length { group: number, found: 7 }));
                let text = with_group(number.into(), |group| group[at] = 'u');
                let error = RecoveryKeyError::Character { group: number, place: at + 1 };
                assert_eq!(RecoveryKey::from_text(&text), Err(error));
            }
        }
    }

    #[test]
    fn groups_that_changed_places_or_are_missing_are_found() {
        let text = key().to_text();
        let words: Vec<&str> = text.split('-').collect();
        for (a, b) in (1..9).flat_map(|a| (1..a).map(move |b| (a, b))) {
            let mut swapped = words.clone();
            swapped.swap(a, b);
            assert!(matches!(RecoveryKey::from_text(&swapped.join("-")), Err(RecoveryKeyError::Group { .. })));
        }
        assert_eq!(RecoveryKey::from_text(&words[..9].join("-")), Err(RecoveryKeyError::Groups { found: 8 }));
        assert_eq!(RecoveryKey::from_text("XVRK"), Err(RecoveryKeyError::Groups { found: 0 }));
        assert_eq!(RecoveryKey::from_text("a passphrase"), Err(RecoveryKeyError::Groups { found: 0 }));
        assert!(
            !RecoveryKey::is_meant_by(&Secret::new("xvrkles")) && RecoveryKey::is_meant_by(&Secret::new("xvrk les"))
        );
        // A group of another key that fits by itself.
        let other = RecoveryKey::from_bytes([9; 32]).to_text();
        let mut mixed = words;
        mixed[4] = other.split('-').nth(4).unwrap();
        assert_eq!(RecoveryKey::from_text(&mixed.join("-")), Err(RecoveryKeyError::Whole));
    }

    proptest! {
        #[test]
        fn every_key_reads_back(bytes: [u8; 32]) {
            let key = RecoveryKey::from_bytes(bytes);
            prop_assert_eq!(RecoveryKey::from_text(&key.to_text()), Ok(key));
        }

        #[test]
        fn no_other_text_is_read_as_a_key(text in "\\PC{0,100}") {
            prop_assert!(RecoveryKey::from_text(&text).is_err());
            let meant = format!("XVRK-{text}");
            prop_assert!(RecoveryKey::from_text(&meant).is_err());
        }
    }
}
