//! x
/// Which encoding calls use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// JSON-RPC 2.0 where the host offers it, else XML-RPC.
    #[default]
    Auto,
    /// XML-RPC, which every host offers.
    Xml,
    /// JSON-RPC 2.0.
    Json,
}
