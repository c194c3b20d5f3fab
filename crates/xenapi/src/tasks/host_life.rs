//! Whether the hosts that a task needs go on living. A task whose host died, or whose toolstack started anew, stays
//! pending for ever: nobody is left who would end it (X06).

use super::WaitOptions;
use crate::generated::ErrorCode;
use crate::session_handle::Session;
use crate::{XenApiError, host, host_metrics};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What changes when a host or its toolstack starts anew.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Life {
    boot_time: Option<String>,
    agent_start_time: Option<String>,
}

impl Life {
    fn of(record: &host::Record) -> Self {
        let time = |key: &str| record.other_config.get(key).cloned();
        Self { boot_time: time("boot_time"), agent_start_time: time("agent_start_time") }
    }
}

/// Hosts that work needs, as they were before it was asked for: what [`host_lives`] saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLives(BTreeMap<host::Ref, Option<Life>>);

/// Looks at the hosts that work will need, before the work is asked for: a host that starts anew between the call and the
/// first look at its task is noticed by that. Null references are left out. A host that can not be looked at counts
/// from the first time that it can.
pub async fn host_lives(session: &Session, hosts: &[host::Ref]) -> HostLives {
    let mut lives = BTreeMap::new();
    for host in hosts.iter().filter(|host| !host.is_null()) {
        let life = match host::get_record(session, host).await {
            Ok(record) => Some(Life::of(&record)),
            Err(error) => {
                tracing::debug!(%error, "a host can not be looked at");
                None
            }
        };
        lives.insert(host.clone(), life);
    }
    HostLives(lives)
}

/// Looks at hosts every now and then.
pub(super) struct Watch<'a> {
    session: &'a Session,
    hosts: &'a HostLives,
    every: Duration,
    looked: Option<Instant>,
    first: BTreeMap<host::Ref, Life>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(session: &'a Session, options: &'a WaitOptions) -> Self {
        let known = options.hosts.0.iter();
        let first = known.filter_map(|(host, life)| Some((host.clone(), life.clone()?))).collect();
        Self { session, hosts: &options.hosts, every: options.host_check, looked: None, first }
    }

    /// The name of a host that is gone or has begun a new life, if it is time to look. A pool that does not answer says
    /// nothing about its hosts.
    pub(super) async fn gone(&mut self, resident: Option<&host::Ref>) -> Option<String> {
        if self.looked.is_some_and(|looked| looked.elapsed() < self.every) {
            return None;
        }
        self.looked = Some(Instant::now());
        let mut hosts: Vec<&host::Ref> = resident.into_iter().chain(self.hosts.0.keys()).collect();
        hosts.retain(|host| !host.is_null());
        hosts.sort_unstable();
        hosts.dedup();
        for host in hosts {
            match self.look(host).await {
                Ok(None) => {}
                Ok(Some(gone)) => return Some(gone),
                Err(error) if error.code() == Some(&ErrorCode::HandleInvalid) => return Some(host.as_str().to_owned()),
                Err(error) => tracing::debug!(%error, "a host can not be looked at"),
            }
        }
        None
    }

    async fn look(&mut self, host: &host::Ref) -> Result<Option<String>, XenApiError> {
        let record = host::get_record(self.session, host).await?;
        if let Some(metrics) = record.metrics.non_null() {
            // Without metrics the host has been in the database for a moment only.
            match host_metrics::get_record(self.session, metrics).await {
                Ok(metrics) if !metrics.live => return Ok(Some(record.name_label)),
                Ok(_) => {}
                Err(error) if error.code() == Some(&ErrorCode::HandleInvalid) => {}
                Err(error) => return Err(error),
            }
        }
        let life = Life::of(&record);
        match self.first.get(host) {
            Some(first) if *first != life => Ok(Some(record.name_label)),
            Some(_) => Ok(None),
            None => {
                self.first.insert(host.clone(), life);
                Ok(None)
            }
        }
    }
}
