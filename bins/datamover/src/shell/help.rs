//! What stands at the end of `--help`: the environment, and the exit codes.

use super::exit;

/// Every variable that a program looks at. A test holds it to the sources.
const ENVIRONMENT: &str = "\
Environment:
  XENVAULT_PASSWORD            password of the pool's account, where --password-file is not given
  XENVAULT_PASSPHRASE          passphrase of the repository, where --passphrase-file is not given
  XENVAULT_STATE               state folder of this installation, where --state is not given
  XDG_STATE_HOME, HOME         where the state folder lies if nothing names it
  AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
                               keys of a repository in a bucket, where --s3-keys-file is not given
  AWS_ENDPOINT_URL, AWS_REGION, AWS_CA_BUNDLE
                               the same as --s3-endpoint, --s3-region and --s3-ca-file
  XENVAULT_CACHE               folder for copies of the index, where --cache is not given
  XDG_CACHE_HOME, HOME         where these copies lie if nothing names it
  XENVAULT_LOG                 what is logged, where --log is not given
  SSL_CERT_FILE, SSL_CERT_DIR  the authorities that --system-roots trusts, instead of the machine's
";

/// The end of a program's own help.
pub fn end() -> String {
    format!("{ENVIRONMENT}\n{}", exit::help())
}
