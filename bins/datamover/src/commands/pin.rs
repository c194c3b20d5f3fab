//! `pin`: shows what a pool presents, so that a person can confirm it.

use crate::Outcome;
use crate::shell::exit::{Exit, Refusal};
use crate::shell::output::Format;
use serde_json::json;

pub async fn run(url: &str, format: Format) -> Outcome {
    let shown = xenvault_xenapi::fetch_certificates(url).await?;
    let certificate = shown
        .chain
        .first()
        .ok_or_else(|| Refusal { exit: Exit::Trust, text: format!("{url} shows no certificate") })?;
    let fingerprint = certificate.fingerprint;
    let text = format!(
        "{url} shows a certificate with the SHA-256 fingerprint\n    {fingerprint}\n\
         Compare it with what the coordinator's own console shows (xsconsole, or there:\n    \
         openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256 ).\n\
         Only if they are equal, use it:\n    --fingerprint {fingerprint}"
    );
    format.result(&text, json!({ "url": url, "fingerprint": fingerprint.to_string() }));
    Ok(Exit::Success)
}
