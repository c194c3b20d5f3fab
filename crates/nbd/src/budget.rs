//! How many connections we hold to one host, over all exports (X25: a host serves 16 to everybody).

/// Counts our connections per host. Clones share the count: one budget for the whole process.
#[derive(Clone, Debug)]
pub struct HostBudget {
    per_host: usize,
}

impl HostBudget {
    /// At most `per_host` connections (0 counts as 1) to each address.
    pub fn new(per_host: usize) -> Self {
        Self { per_host: per_host.max(1) }
    }

    /// The limit for each host.
    pub fn per_host(&self) -> usize {
        self.per_host
    }
}

impl Default for HostBudget {
    /// 8, half of what a host allows to all its clients together.
    fn default() -> Self {
        Self::new(8)
    }
}
