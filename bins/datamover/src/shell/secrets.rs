//! Passwords and passphrases: from a file, from standard input or from the environment, never from an argument, where
//! every user of the machine could read them.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Longer files are no secrets but a mistake.
pub const LONGEST_SECRET_BYTES: u64 = 4096;

/// Why a secret could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// Neither file nor variable.
    #[error(
        "no {what} was given: write it to a file that only you can read and name it with {option} FILE (`-` is standard input), or set {variable}"
    )]
    Missing {
        /// `password` or `passphrase`.
        what: &'static str,
        /// The option that names a file.
        option: &'static str,
        /// The variable of the environment.
        variable: &'static str,
    },
    /// The file can not be read.
    #[error("the {what} can not be read from {path}: check that the file exists and that you may read it", path = path.display())]
    Read {
        /// `password` or `passphrase`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// There is a source, with nothing in it.
    #[error("the {what} from {from} is empty: check what writes it")]
    Empty {
        /// `password` or `passphrase`.
        what: &'static str,
        /// File, standard input or variable.
        from: String,
    },
    /// Too long or not text.
    #[error("{path} does not hold a {what}: one line of text, at most {LONGEST_SECRET_BYTES} bytes", path = path.display())]
    NotASecret {
        /// `password` or `passphrase`.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
}

/// A kind of secret and where it may come from.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    what: &'static str,
    option: &'static str,
    variable: &'static str,
}

/// The password of the pool's account.
pub const PASSWORD: Source = Source { what: "password", option: "--password-file", variable: "XENVAULT_PASSWORD" };

/// The passphrase of the repository.
pub const PASSPHRASE: Source =
    Source { what: "passphrase", option: "--passphrase-file", variable: "XENVAULT_PASSPHRASE" };

impl Source {
    /// Reads the secret from `file` (`-`: one line of standard input), else from the environment. The line's end is
    /// not part of it. Where both secrets come from standard input, the password is its first line.
    ///
    /// # Errors
    /// [`SecretError`]; no variant holds the secret.
    pub fn read(self, file: Option<&Path>) -> Result<Zeroizing<String>, SecretError> {
        let (secret, from) = match file {
            Some(path) if path == Path::new("-") => {
                (self.read_line(&mut std::io::stdin().lock(), path)?, "standard input".to_owned())
            }
            Some(path) => (self.read_file(path)?, path.display().to_string()),
            None => match std::env::var(self.variable) {
                Ok(value) => (Zeroizing::new(value), self.variable.to_owned()),
                Err(_) => {
                    return Err(SecretError::Missing { what: self.what, option: self.option, variable: self.variable });
                }
            },
        };
        if secret.is_empty() {
            return Err(SecretError::Empty { what: self.what, from });
        }
        Ok(secret)
    }

    fn read_file(self, path: &Path) -> Result<Zeroizing<String>, SecretError> {
        let file = std::fs::File::open(path).map_err(|source| self.unreadable(path, source))?;
        self.read_line(&mut std::io::BufReader::new(file), path)
    }

    fn read_line(self, input: &mut dyn BufRead, path: &Path) -> Result<Zeroizing<String>, SecretError> {
        let mut line = Zeroizing::new(Vec::new());
        let read = input.take(LONGEST_SECRET_BYTES + 1).read_until(b'\n', &mut line);
        read.map_err(|source| self.unreadable(path, source))?;
        while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            line.pop();
        }
        match std::str::from_utf8(&line) {
            Ok(text) if text.len() < usize::try_from(LONGEST_SECRET_BYTES).unwrap_or(usize::MAX) => {
                Ok(Zeroizing::new(text.to_owned()))
            }
            _ => Err(SecretError::NotASecret { what: self.what, path: path.to_path_buf() }),
        }
    }

    fn unreadable(self, path: &Path, source: std::io::Error) -> SecretError {
        SecretError::Read { what: self.what, path: path.to_path_buf(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(bytes: &[u8]) -> Result<String, String> {
        let mut input = bytes;
        let read = PASSWORD.read_line(&mut input, Path::new("file"));
        read.map(|secret| secret.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_end_of_the_line_is_not_part_of_a_secret() {
        assert_eq!(line(b"pass word \r\n").as_deref(), Ok("pass word "));
        assert_eq!(line(b"pass").as_deref(), Ok("pass"));
        assert_eq!(line(b"first\nsecond\n").as_deref(), Ok("first"));
    }

    #[test]
    fn two_secrets_on_one_input_are_two_lines() {
        let mut input: &[u8] = b"first\nsecond\n";
        assert_eq!(*PASSWORD.read_line(&mut input, Path::new("-")).unwrap(), "first");
        assert_eq!(*PASSPHRASE.read_line(&mut input, Path::new("-")).unwrap(), "second");
    }

    #[test]
    fn what_is_no_secret_is_not_shown() {
        let error = line(&[0xff, 0xfe]).unwrap_err();
        assert_eq!(error, "file does not hold a password: one line of text, at most 4096 bytes");
        assert!(line(&[b'a'; 5000]).is_err());
    }

    #[test]
    fn missing_secrets_say_what_to_do() {
        let source = Source { variable: "XENVAULT_NO_SUCH_VARIABLE", ..PASSPHRASE };
        let text = source.read(None).unwrap_err().to_string();
        assert!(text.contains("--passphrase-file FILE") && text.contains("XENVAULT_NO_SUCH_VARIABLE"), "{text}");
        let text = PASSWORD.read(Some(Path::new("/no/such/file"))).unwrap_err().to_string();
        assert!(text.contains("/no/such/file"), "{text}");
    }
}
