//! Where a bucket is, what opens it, and how long to try.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use zeroize::Zeroizing;

use super::Bucket;
use super::courier::Courier;

/// How long a request is tried, and tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// An attempt that moves no byte for this long is given up.
    pub silence: Duration,
    /// So long a request is tried again in all. Above the usual restart of a gateway.
    pub total: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { silence: Duration::from_secs(60), total: Duration::from_secs(180) }
    }
}

/// Where a bucket is and what opens it.
#[derive(Clone)]
pub struct BucketOptions {
    /// Name of the bucket.
    pub bucket: String,
    /// Folder within the bucket, without slashes at its ends; empty for the bucket itself. Several repositories can
    /// share a bucket under different folders.
    pub folder: String,
    /// `https://s3.example.com:7480`; `None` for Amazon's own.
    pub endpoint: Option<String>,
    /// Region as the service wants it signed.
    pub region: String,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: Zeroizing<String>,
    /// Token of a session, where the keys are of one.
    pub session_token: Option<Zeroizing<String>>,
    /// A certificate authority of the service beside those of the system, in PEM.
    pub authority: Option<Vec<u8>>,
    /// Whether data may travel without TLS.
    pub clear_text: bool,
    /// How long to try.
    pub patience: Patience,
}

impl std::fmt::Debug for BucketOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BucketOptions")
            .field("bucket", &self.bucket)
            .field("folder", &self.folder)
            .field("endpoint", &self.endpoint)
            .field("access_key", &self.access_key)
            .finish_non_exhaustive()
    }
}

impl BucketOptions {
    pub(in crate::backend) fn courier(&self) -> io::Result<Courier> {
        // The provider of this process may have been chosen by somebody else: that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Courier::new(self.authority.as_deref(), self.clear_text, self.patience.silence).map_err(invalid)
    }

    fn finish(&self, store: Arc<dyn ObjectStore>, scheme: &str) -> io::Result<Bucket> {
        let location = format!("{scheme}://{}/{}", self.bucket, self.folder);
        Ok(Bucket::on(store, &self.folder, location.trim_end_matches('/'))?.with_patience(self.patience))
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// Attempts are repeated here and not in the library, which gives up on listings that break in the middle, and signs only
/// once.
fn once() -> RetryConfig {
    RetryConfig { max_retries: 0, retry_timeout: Duration::ZERO, ..RetryConfig::default() }
}

impl Bucket {
    /// A bucket of an S3 service. Nothing is asked of the service yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the options can not be used.
    pub fn s3(options: &BucketOptions) -> io::Result<Self> {
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&options.bucket)
            .with_region(&options.region)
            .with_access_key_id(&options.access_key)
            .with_secret_access_key(options.secret_key.as_str())
            .with_client_options(ClientOptions::new().with_allow_http(options.clear_text))
            .with_allow_http(options.clear_text)
            .with_http_connector(options.courier()?)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            // A refusal to delete is told by its status, and not in the list of an answer that is a success.
            .with_disable_bulk_delete(true)
            .with_retry(once());
        if let Some(token) = &options.session_token {
            builder = builder.with_token(token.as_str());
        }
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint).with_virtual_hosted_style_request(false);
        }
        let store = builder.build().map_err(invalid)?;
        options.finish(Arc::new(store), "s3")
    }

    /// A container of Azure Blob Storage: `access_key` is the name of the account, `secret_key` its key. Not tested
    /// against the service.
    ///
    /// # Errors
    /// As [`Self::s3`].
    #[cfg(feature = "azure")]
    pub fn azure(options: &BucketOptions) -> io::Result<Self> {
        let mut builder = object_store::azure::MicrosoftAzureBuilder::new()
            .with_container_name(&options.bucket)
            .with_account(&options.access_key)
            .with_access_key(options.secret_key.as_str())
            .with_client_options(ClientOptions::new().with_allow_http(options.clear_text))
            .with_allow_http(options.clear_text)
            .with_http_connector(options.courier()?)
            .with_retry(once());
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let store = builder.build().map_err(invalid)?;
        options.finish(Arc::new(store), "azure")
    }

    /// A bucket of Google Cloud Storage: `secret_key` is the JSON of a service account's key. Not tested against the
    /// service.
    ///
    /// # Errors
    /// As [`Self::s3`].
    #[cfg(feature = "gcs")]
    pub fn gcs(options: &BucketOptions) -> io::Result<Self> {
        let store = object_store::gcp::GoogleCloudStorageBuilder::new()
            .with_bucket_name(&options.bucket)
            .with_service_account_key(options.secret_key.as_str())
            .with_client_options(ClientOptions::new().with_allow_http(options.clear_text))
            .with_http_connector(options.courier()?)
            .with_retry(once())
            .build()
            .map_err(invalid)?;
        options.finish(Arc::new(store), "gcs")
    }
}
