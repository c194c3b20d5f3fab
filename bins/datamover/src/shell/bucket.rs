//! The object store of a command line: address, keys, trust.

use super::secrets::LONGEST_SECRET_BYTES;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use xenvault_block::ByteSize;
use xenvault_store::backend::{Backend, Bucket, BucketOptions, Patience, open_bucket};
use xenvault_store::{IndexCacheOptions, StoreError};
use zeroize::Zeroizing;

/// What stands before the name of a bucket.
const SCHEME: &str = "s3://";

/// A wrong address or a service that is down is told soon; once it has answered, it is waited for.
const FIRST_CONTACT: Patience = Patience { silence: Duration::from_secs(10), total: Duration::from_secs(10) };

/// Options of repositories in a bucket.
#[derive(Clone, Debug, clap::Args)]
pub struct BucketArguments {
    /// Address of the S3 service, such as https://s3.example.com:7480 [default: Amazon's]
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL")]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket
    #[arg(long, value_name = "NAME", env = "AWS_REGION", default_value = "us-east-1")]
    pub s3_region: String,
    /// File with the access key on its first line, the secret key on the second and, where there is one, the session's
    /// token on the third. Otherwise AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN are used
    #[arg(long, value_name = "FILE")]
    pub s3_keys_file: Option<PathBuf>,
    /// Certificates (PEM) of an authority that signed the service's certificate, beside those that the machine trusts
    #[arg(long, value_name = "FILE", env = "AWS_CA_BUNDLE")]
    pub s3_ca_file: Option<PathBuf>,
    /// Accept an endpoint with http://: backups stay encrypted, but everybody on the network sees when what is stored
    #[arg(long)]
    pub s3_accept_clear_text: bool,
    /// Folder for copies of the index of repositories in a bucket [default: $XDG_CACHE_HOME/xenvault or ~/.cache/xenvault]
    #[arg(long, value_name = "DIR", env = "XENVAULT_CACHE")]
    pub cache: Option<PathBuf>,
    /// Most bytes of these copies, for each repository; 0 keeps none
    #[arg(long, value_name = "SIZE", default_value = "4GiB")]
    pub cache_limit: ByteSize,
}

/// Why there is no bucket to ask.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BucketError {
    /// No bucket in the address.
    #[error("{address:?} names no bucket: write s3://BUCKET/FOLDER")]
    Address {
        /// As given.
        address: String,
    },
    /// HTTP without consent.
    #[error(
        "{endpoint} is not encrypted: use https://, or accept with --s3-accept-clear-text that everybody on the network sees the requests"
    )]
    ClearText {
        /// The service.
        endpoint: String,
    },
    /// No keys.
    #[error(
        "no keys of the object store were given: write access key and secret key to the two first lines of a file that only you can read and name it with --s3-keys-file, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )]
    NoKeys,
    /// The file does not hold keys.
    #[error("{path} does not hold the keys of the object store: access key and secret key on a line each", path = path.display())]
    Keys {
        /// The file.
        path: PathBuf,
    },
    /// A file can not be read.
    #[error("{path} can not be read: check that the file exists and that you may read it", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The options do not fit together.
    #[error("the address of the object store can not be used")]
    Options {
        /// What is wrong with them.
        source: std::io::Error,
    },
}

/// Bucket and folder, if the repository is in a bucket.
pub fn address(repository: &Path) -> Option<Result<(String, String), BucketError>> {
    let rest = repository.to_str()?.strip_prefix(SCHEME)?;
    let (bucket, folder) = rest.split_once('/').unwrap_or((rest, ""));
    let is_bucket =
        !bucket.is_empty() && bucket.chars().all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter));
    Some(if is_bucket {
        Ok((bucket.to_owned(), folder.trim_matches('/').to_owned()))
    } else {
        Err(BucketError::Address { address: repository.display().to_string() })
    })
}

impl BucketArguments {
    /// Where the bucket is and what opens it.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn options(&self, bucket: String, folder: String) -> Result<BucketOptions, BucketError> {
        let clear_text = self
            .s3_endpoint
            .as_deref()
            .is_some_and(|endpoint| endpoint.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("http://")));
        if let Some(endpoint) = self.s3_endpoint.as_ref().filter(|_| clear_text && !self.s3_accept_clear_text) {
            return Err(BucketError::ClearText { endpoint: endpoint.clone() });
        }
        let authority = match &self.s3_ca_file {
            Some(path) => Some(std::fs::read(path).map_err(|source| unreadable(path, source))?),
            None => None,
        };
        let keys = self.keys()?;
        Ok(BucketOptions {
            bucket,
            folder,
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
            access_key: keys.access.to_string(),
            secret_key: keys.secret,
            session_token: keys.token,
            authority,
            clear_text,
            patience: Patience::default(),
        })
    }

    /// Where copies of the index are kept; nowhere if there is no folder for them.
    pub fn index_cache(&self) -> Option<IndexCacheOptions> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || variable("HOME").map(|home| home.join(".cache"));
        let usual = || variable("XDG_CACHE_HOME").or_else(home).map(|folder| folder.join("xenvault"));
        let folder = self.cache.clone().or_else(usual).filter(|_| self.cache_limit.0 > 0)?;
        Some(IndexCacheOptions { folder, limit_bytes: self.cache_limit.0 })
    }

    fn keys(&self) -> Result<Keys, BucketError> {
        match &self.s3_keys_file {
            Some(path) => Keys::read(path),
            None => {
                let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty()).map(Zeroizing::new);
                match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
                    (Some(access), Some(secret)) => Ok(Keys { access, secret, token: variable("AWS_SESSION_TOKEN") }),
                    _ => Err(BucketError::NoKeys),
                }
            }
        }
    }
}

struct Keys {
    access: Zeroizing<String>,
    secret: Zeroizing<String>,
    token: Option<Zeroizing<String>>,
}

impl Keys {
    fn read(path: &Path) -> Result<Self, BucketError> {
        use std::io::Read as _;
        let wrong = || BucketError::Keys { path: path.to_owned() };
        let mut text = Zeroizing::new(String::new());
        let file = std::fs::File::open(path).map_err(|source| unreadable(path, source))?;
        file.take(LONGEST_SECRET_BYTES + 1).read_to_string(&mut text).map_err(|_| wrong())?;
        if text.len() as u64 > LONGEST_SECRET_BYTES {
            return Err(wrong());
        }
        let mut lines = text.lines().map(|line| Zeroizing::new(line.trim().to_owned())).filter(|line| !line.is_empty());
        match (lines.next(), lines.next(), lines.next(), lines.next()) {
            (Some(access), Some(secret), token, None) => Ok(Self { access, secret, token }),
            _ => Err(wrong()),
        }
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> BucketError {
    BucketError::Read { path: path.to_owned(), source }
}

/// Asks the service whether it is there and knows the keys, without the patience of later requests; then whether the bucket
/// keeps versions, and gives the place that fits.
///
/// # Errors
/// [`StoreError::Backend`] with what it said.
pub async fn meet(options: &BucketOptions) -> Result<Arc<dyn Backend>, StoreError> {
    let failed = |source| StoreError::Backend { action: "look for", object: "config".to_owned(), source };
    let bucket = Bucket::s3(options).map_err(failed)?;
    match bucket.with_patience(FIRST_CONTACT).length("config").await {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(failed(source)),
        _ => open_bucket(options).await.map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_bucket_and_may_have_a_folder() {
        let parts = |text: &str| address(Path::new(text)).map(Result::ok);
        assert_eq!(parts("/backup"), None);
        assert_eq!(parts("s3:/backup"), None);
        assert_eq!(parts("s3://backups"), Some(Some(("backups".to_owned(), String::new()))));
        assert_eq!(parts("s3://backups/a/b/"), Some(Some(("backups".to_owned(), "a/b".to_owned()))));
        for wrong in ["s3://", "s3:///folder", "s3://key:secret@host/folder"] {
            assert_eq!(parts(wrong), Some(None), "{wrong}");
        }
    }

    #[test]
    fn keys_come_from_the_lines_of_a_file_and_are_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Keys::read(&path)
        };
        let keys = read("ACCESS\nse cret\r\n\n").ok().unwrap();
        assert_eq!((keys.access.as_str(), keys.secret.as_str(), keys.token), ("ACCESS", "se cret", None));
        assert_eq!(read("a\nb\nc\n").ok().unwrap().token.as_deref().map(String::as_str), Some("c"));
        for wrong in ["", "one", "a\nb\nc\nd\n", &"x".repeat(5000)] {
            assert!(matches!(read(wrong), Err(BucketError::Keys { .. })), "{wrong}");
        }
    }
}
