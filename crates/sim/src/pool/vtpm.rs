//! The TPMs of VMs, from the guest's side.

use super::SimPool;
use crate::SimError;

impl SimPool {
    /// Sets what a VM's TPM holds, as its guest does; makes the TPM if it has none. Any text: a real one is base64.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn set_vtpm_contents(&self, vm: &str, content: &str) -> Result<(), SimError> {
        let vm = self.vm_ref(vm)?;
        let core = &self.inner.core;
        let vtpm = {
            let mut db = core.db();
            match db.set_of("VM", &vm, "VTPMs").into_iter().next() {
                Some(vtpm) => vtpm,
                None => db.create("VTPM", vec![("VM", vm.as_str().into())]),
            }
        };
        core.set_vtpm(&vtpm, content.to_owned());
        Ok(())
    }

    /// What a VM's TPM holds; `None` without one.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn vtpm_contents(&self, vm: &str) -> Result<Option<String>, SimError> {
        let vm = self.vm_ref(vm)?;
        let core = &self.inner.core;
        let vtpm = core.db().set_of("VM", &vm, "VTPMs").into_iter().next();
        Ok(vtpm.map(|vtpm| core.vtpm(&vtpm)))
    }
}
