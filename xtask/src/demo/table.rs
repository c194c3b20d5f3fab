//! The table at the end of the demo.

use crate::run::Outcome;
use serde_json::Value;

/// One backup.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Name of the VM.
    pub vm: String,
    /// `FULL` or `INC`.
    pub level: String,
    /// Why that was read.
    pub reason: String,
    /// Size of its disks in bytes.
    pub disk_bytes: u64,
    /// Bytes that counted as changed.
    pub changed_bytes: u64,
    /// Bytes read from the pool, the check sample included.
    pub read_bytes: u64,
    /// Bytes that the repository grew by.
    pub stored_bytes: u64,
    /// From start to end of the program.
    pub seconds: f64,
}

impl Row {
    /// Takes the figures out of the datamover's report.
    ///
    /// # Errors
    /// If one is missing.
    pub fn of(report: &Value, seconds: f64) -> Outcome<Self> {
        let text = |name: &str| {
            let value = report.get(name).and_then(Value::as_str);
            value.map(str::to_owned).ok_or_else(|| format!("the report has no {name}: {report}"))
        };
        let total = |name: &str| {
            let value = report.get("totals").and_then(|totals| totals.get(name)).and_then(Value::as_u64);
            value.ok_or_else(|| format!("the report has no total of {name}: {report}"))
        };
        let disks = report.get("disks").and_then(Value::as_array).ok_or("the report has no disks")?;
        let sum = |name: &str| disks.iter().filter_map(|disk| disk.get(name).and_then(Value::as_u64)).sum();
        Ok(Self {
            vm: text("vm_name")?,
            level: text("level")?,
            reason: text("reason")?,
            disk_bytes: sum("virtual_size"),
            changed_bytes: sum("changed_bytes"),
            read_bytes: total("read_bytes")? + total("sample_bytes")?,
            stored_bytes: total("stored_bytes")?,
            seconds,
        })
    }
}

/// The table as text.
pub fn render(rows: &[Row]) -> String {
    let mut cells =
        vec![["VM", "level", "reason", "disk size", "changed", "read", "stored", "seconds"].map(str::to_owned)];
    for row in rows {
        cells.push([
            row.vm.clone(),
            row.level.clone(),
            row.reason.clone(),
            size(row.disk_bytes),
            size(row.changed_bytes),
            size(row.read_bytes),
            size(row.stored_bytes),
            format!("{:.1}", row.seconds),
        ]);
    }
    let width = |column: usize| cells.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let lines = cells.iter().map(|row| {
        let line: String = row
            .iter()
            .enumerate()
            .map(|(column, cell)| match column {
                0..=2 => format!("{cell:<width$}  ", width = width(column)),
                _ => format!("{cell:>width$}  ", width = width(column)),
            })
            .collect();
        line.trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn size(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        1..0x10_0000 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_a_line() {
        let report = serde_json::json!({
            "vm_name": "web", "level": "INC", "reason": "changed-blocks",
            "disks": [{ "virtual_size": 1 << 28, "changed_bytes": 65536 }, { "virtual_size": 1 << 20, "changed_bytes": 0 }],
            "totals": { "read_bytes": 65536, "sample_bytes": 131_072, "stored_bytes": 100 },
        });
        let row = Row::of(&report, 1.25).unwrap();
        let text = render(&[row]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>().join(" "),
            "web INC changed-blocks 257.0 MiB 64 KiB 192 KiB 1 KiB 1.2"
        );
        assert!(Row::of(&serde_json::json!({}), 0.0).is_err());
    }
}
