//! `pin`: shows what a pool presents, so that a person can confirm it; and, once that was done, what all members present.

use crate::Outcome;
use crate::arguments::PinArguments;
use crate::shell::exit::{Exit, Refusal};
use crate::shell::output::Format;
use crate::shell::pins;
use crate::shell::pool::PoolFailure;
use crate::shell::secrets::PASSWORD;
use serde_json::{Value, json};
use xenvault_xenapi::{ConnectOptions, Member, Session, Sha256Fingerprint, Trust, XenApiError, fetch_certificates};

pub async fn run(arguments: PinArguments, format: Format) -> Outcome {
    match &arguments.fingerprint {
        None => coordinator(&arguments.url, format).await,
        Some(fingerprint) => members(&arguments, fingerprint, format).await,
    }
}

/// The certificate at the address. Nothing is sent, and nothing is kept.
async fn coordinator(url: &str, format: Format) -> Outcome {
    let fingerprint = shown_at(url).await?;
    let text = format!(
        "{url} shows a certificate with the SHA-256 fingerprint\n    {fingerprint}\n\
         Compare it with what the coordinator's own console shows (xsconsole, or there:\n    \
         openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256 ).\n\
         Only if they are equal, use it:\n    --fingerprint {fingerprint}\n\
         To see the certificates of all members of the pool, which are learned from the coordinator:\n    \
         xenvault-datamover pin {url} --fingerprint {fingerprint}"
    );
    Ok(format.result(&text, json!({ "url": url, "fingerprint": fingerprint.to_string() })))
}

async fn shown_at(url: &str) -> Result<Sha256Fingerprint, Box<dyn std::error::Error>> {
    let shown = fetch_certificates(url).await?;
    let certificate = shown
        .chain
        .first()
        .ok_or_else(|| Refusal { exit: Exit::Trust, text: format!("{url} shows no certificate") })?;
    Ok(certificate.fingerprint)
}

/// What is known of one member's certificate, from three sides.
struct Row {
    member: Member,
    /// What the host itself shows; `None` if it could not be asked.
    shown: Option<Sha256Fingerprint>,
    /// What was remembered from an earlier login.
    remembered: Option<Sha256Fingerprint>,
}

impl Row {
    fn verdict(&self) -> &'static str {
        match (self.member.fingerprint, self.shown) {
            (Some(told), Some(shown)) if told == shown => "confirmed",
            (Some(_), Some(_)) => "differs",
            (Some(_), None) => "unreachable",
            (None, _) => "unknown",
        }
    }

    fn text(&self) -> String {
        let Member { name, address, fingerprint, .. } = &self.member;
        let told = fingerprint.map_or_else(|| "(the coordinator could not tell)".to_owned(), |told| told.to_string());
        let mut text = format!("{name} ({address})\n    {told}\n");
        text.push_str(match self.verdict() {
            "confirmed" => "    the host shows the same\n",
            "differs" => "    BUT THE HOST SHOWS ANOTHER ONE: it is not followed. Somebody may be between you and it\n",
            "unreachable" => "    the host can not be reached from here\n",
            _ => "    it is learned once the host is up again; until then the host is not followed\n",
        });
        if let (true, Some(shown)) = (self.verdict() == "differs", self.shown) {
            text.push_str(&format!("    {shown}\n"));
        }
        if let Some(before) = self.remembered.filter(|before| Some(*before) != *fingerprint) {
            text.push_str(&format!("    before: {before}\n"));
        }
        text
    }

    fn json(&self) -> Value {
        let of = |fingerprint: Option<Sha256Fingerprint>| fingerprint.map(|found| found.to_string());
        let Member { name, uuid, address, fingerprint, .. } = &self.member;
        json!({
            "name": name, "uuid": uuid, "address": address, "fingerprint": of(*fingerprint), "shown": of(self.shown),
            "remembered": of(self.remembered), "verdict": self.verdict(),
        })
    }
}

/// The certificates of all members, learned from the confirmed coordinator, which are kept from now on.
async fn members(arguments: &PinArguments, fingerprint: &str, format: Format) -> Outcome {
    let url = &arguments.url;
    let confirmed = fingerprint.parse().map_err(|_| PoolFailure::Fingerprint { text: fingerprint.to_owned() })?;
    let password = PASSWORD.read(arguments.password_file.as_deref())?;
    let state = arguments.state.folder()?;
    let before = pins::remembered(&state, url).unwrap_or_default().hosts;
    // With the confirmed fingerprint alone, whatever was remembered.
    let trust = Trust::Fingerprint(confirmed);
    let options = ConnectOptions::new(url, &arguments.user, password.to_string(), trust);
    let session = Session::login(options).await.map_err(|source| PoolFailure::Login { url: url.clone(), source })?;
    pins::save(&state, url, confirmed, session.pinned_hosts());
    let learned = session.members();
    let logged_out = session.logout().await;
    let mut rows = Vec::new();
    for member in learned {
        let shown = shown_by(url, &member.address).await;
        let remembered = before.get(&member.address).copied();
        rows.push(Row { member, shown, remembered });
    }
    let list: String = rows.iter().map(Row::text).collect();
    let text = format!(
        "The pool at {url} has {} members. The coordinator says that these are their certificates, and later runs\n\
         follow no others:\n{list}",
        rows.len()
    );
    let told = format.result(&text, json!({ "url": url, "members": rows.iter().map(Row::json).collect::<Vec<_>>() }));
    logged_out?;
    let differs = rows.iter().any(|row| row.verdict() == "differs");
    Ok(if differs { Exit::Trust } else { told })
}

/// What the member at `address` shows; the port is that of the pool's address.
async fn shown_by(url: &str, address: &str) -> Option<Sha256Fingerprint> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let port = port(url).map(|port| format!(":{port}")).unwrap_or_default();
    let found: Result<_, XenApiError> = fetch_certificates(&format!("https://{host}{port}")).await;
    found.ok().and_then(|shown| shown.chain.first().map(|certificate| certificate.fingerprint))
}

/// The port in an address, if it names one.
fn port(url: &str) -> Option<&str> {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next()?;
    let behind = authority.rsplit_once(']').map_or(authority, |(_, rest)| rest);
    behind.rsplit_once(':').map(|(_, port)| port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_of_an_address() {
        for (url, expected) in [
            ("https://a.example:4443/x", Some("4443")),
            ("https://192.0.2.1", None),
            ("https://[2001:db8::1]:443", Some("443")),
            ("https://[2001:db8::1]", None),
        ] {
            assert_eq!(port(url), expected, "{url}");
        }
    }
}
