//! Progress of maintenance on standard error: a live line on a terminal, plain lines elsewhere, JSON for machines.

use crate::shell::output::{Format, notice};
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::json;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xenvault_block::ByteSize;
use xenvault_store::{MaintenanceMonitor, MaintenanceProgress, MaintenanceStage};

/// Lines of one stage come at most this often.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Shows progress. Dropped, it takes the live line away, so that results do not mix with it.
pub struct Screen {
    live: Option<ProgressBar>,
    monitor: MaintenanceMonitor,
}

impl Screen {
    /// Picks the look from where standard error goes.
    pub fn new(format: Format) -> Self {
        let live = (format == Format::Text && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(4));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        let (bar, last) = (live.clone(), Arc::new(Mutex::new(None::<(MaintenanceStage, Instant)>)));
        let monitor = MaintenanceMonitor::new(move |progress| {
            if let Some(bar) = &bar {
                bar.set_message(line(&progress));
                return;
            }
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            let is_due = last.is_none_or(|(stage, at)| stage != progress.stage || at.elapsed() >= BETWEEN_LINES);
            if is_due {
                *last = Some((progress.stage, Instant::now()));
                match format {
                    Format::Text => notice(&line(&progress)),
                    Format::Json => notice(&record(&progress).to_string()),
                }
            }
        });
        Self { live, monitor }
    }

    /// What the repository is given.
    pub fn monitor(&self) -> MaintenanceMonitor {
        self.monitor.clone()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(bar) = &self.live {
            bar.finish_and_clear();
        }
    }
}

fn line(progress: &MaintenanceProgress) -> String {
    let mut text = progress.stage.to_string();
    match (progress.done, progress.planned) {
        (0, 0) => {}
        (done, 0) => text.push_str(&format!(": {done}")),
        (done, planned) => text.push_str(&format!(": {done} of {planned}")),
    }
    if progress.read_bytes > 0 {
        text.push_str(&format!(", read {}", ByteSize(progress.read_bytes)));
    }
    text
}

fn record(progress: &MaintenanceProgress) -> serde_json::Value {
    json!({
        "event": "progress",
        "stage": progress.stage.to_string(),
        "done": progress.done,
        "planned": progress.planned,
        "read_bytes": progress.read_bytes,
    })
}
