//! Shows a workflow's progress on standard error: a live line on a terminal, plain lines elsewhere, JSON for machines.

use super::output::{Format, notice};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use xenvault_block::ByteSize;
use xenvault_engine::{JobMonitor, Progress, Stage, SweepPlan, Warning};

/// Plain lines come at most this often.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Machines get figures at most this often.
const BETWEEN_RECORDS: Duration = Duration::from_secs(1);

/// A [`JobMonitor`] for the terminal.
pub struct Monitor {
    look: Look,
    last: Mutex<Option<Instant>>,
}

enum Look {
    Live(ProgressBar),
    Lines,
    Json,
}

impl Monitor {
    /// Picks the look from where standard error goes.
    pub fn new(format: Format) -> Self {
        let look = match format {
            Format::Json => Look::Json,
            Format::Text if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(4));
                bar.enable_steady_tick(Duration::from_millis(250));
                Look::Live(bar)
            }
            Format::Text => Look::Lines,
        };
        Self { look, last: Mutex::new(None) }
    }

    /// Takes the live line away, so that results do not mix with it.
    pub fn finish(&self) {
        if let Look::Live(bar) = &self.look {
            bar.finish_and_clear();
        }
    }

    fn say(&self, text: &str) {
        match &self.look {
            Look::Live(bar) => bar.println(text),
            Look::Lines | Look::Json => notice(text),
        }
    }

    /// Whether figures are due again.
    fn is_due(&self, between: Duration) -> bool {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| now.duration_since(last) < between) {
            return false;
        }
        *last = Some(now);
        true
    }
}

impl JobMonitor for Monitor {
    fn stage(&self, stage: &Stage) {
        match &self.look {
            Look::Live(bar) => bar.set_message(stage.to_string()),
            Look::Lines => notice(&stage.to_string()),
            Look::Json => notice(&json!({ "event": "stage", "stage": stage.to_string() }).to_string()),
        }
    }

    fn progress(&self, progress: &Progress) {
        match &self.look {
            Look::Live(bar) => {
                if bar.length() != Some(progress.planned_bytes) {
                    bar.set_length(progress.planned_bytes);
                    bar.set_style(live_style());
                }
                bar.set_position(progress.done_bytes);
                bar.set_prefix(figures(progress));
            }
            Look::Lines if self.is_due(BETWEEN_LINES) => {
                let (done, planned) = (ByteSize(progress.done_bytes), ByteSize(progress.planned_bytes));
                notice(&format!("{done} of {planned}, {}", figures(progress)));
            }
            Look::Json if self.is_due(BETWEEN_RECORDS) => {
                let mut record = totals(progress);
                if let Some(record) = record.as_object_mut() {
                    record.insert("event".to_owned(), json!("progress"));
                }
                notice(&record.to_string());
            }
            Look::Lines | Look::Json => {}
        }
    }

    fn warning(&self, warning: &Warning) {
        match &self.look {
            Look::Json => {
                notice(&json!({ "event": "warning", "code": warning.code, "text": warning.text }).to_string());
            }
            Look::Live(_) | Look::Lines => self.say(&format!("warning: {}", warning.text)),
        }
    }

    fn sweep_plan(&self, plan: &SweepPlan) {
        if let Look::Live(_) | Look::Lines = self.look {
            self.say(&format!("{} to remove, {} to keep", plan.remove.len(), plan.keep.len()));
        }
    }
}

fn live_style() -> ProgressStyle {
    // The template is a constant; should it ever be wrong, a plain bar is shown.
    ProgressStyle::with_template("{msg}\n[{bar:30}] {percent:>3}%  {prefix}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// The figures of a moment, for people.
fn figures(progress: &Progress) -> String {
    let mut text = format!("read {}, stored {}", ByteSize(progress.read_bytes), ByteSize(progress.stored_bytes));
    if let Some(share) = progress.dedup_share() {
        text.push_str(&format!(", dedup {:.0}%", share * 100.0));
    }
    if let Some(ratio) = progress.compression_ratio() {
        text.push_str(&format!(", compression {ratio:.1}x"));
    }
    text.push_str(&format!(", {}/s", ByteSize(progress.rate_bytes_per_second)));
    if let Some(left) = progress.time_left {
        text.push_str(&format!(", {} left", duration(left)));
    }
    if let Some(bottleneck) = progress.bottleneck {
        text.push_str(&format!(", limited by the {bottleneck}"));
    }
    text
}

/// The same figures for machines; all sizes in bytes, times in seconds.
pub fn totals(progress: &Progress) -> serde_json::Value {
    json!({
        "planned_bytes": progress.planned_bytes,
        "done_bytes": progress.done_bytes,
        "read_bytes": progress.read_bytes,
        "sample_bytes": progress.sample_bytes,
        "zero_bytes": progress.zero_bytes,
        "dedup_bytes": progress.dedup_bytes,
        "new_bytes": progress.new_bytes,
        "stored_bytes": progress.stored_bytes,
        "elapsed_seconds": progress.elapsed.as_secs_f64(),
        "rate_bytes_per_second": progress.rate_bytes_per_second,
        "time_left_seconds": progress.time_left.map(|left| left.as_secs_f64()),
        "dedup_share": progress.dedup_share(),
        "compression_ratio": progress.compression_ratio(),
        "bottleneck": progress.bottleneck.map(|bottleneck| bottleneck.to_string()),
    })
}

/// `59 s`, `3 min 20 s`, `2 h 5 min`.
pub fn duration(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        for (seconds, text) in [(0, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn figures_name_every_value() {
        let mut progress = Progress::default();
        progress.read_bytes = 8 << 20;
        progress.stored_bytes = 1 << 20;
        progress.new_bytes = 2 << 20;
        progress.dedup_bytes = 2 << 20;
        progress.rate_bytes_per_second = 4 << 20;
        progress.time_left = Some(Duration::from_secs(61));
        progress.bottleneck = Some(xenvault_engine::Bottleneck::Processor);
        assert_eq!(
            figures(&progress),
            "read 8 MiB, stored 1 MiB, dedup 50%, compression 2.0x, 4 MiB/s, 1 min 1 s left, limited by the processor"
        );
    }
}
