//! The classes that can be followed: one table of typed records each, and what can happen to an object.
//!
//! Pure. An object leaves a table only when it was seen to be gone; a record that can not be read leaves the object
//! as it was.

use super::Table;
use crate::event::{Event, Operation};
use crate::model::Class;
use crate::reference::Ref;
use crate::value::FromValue;
use crate::{
    certificate, host, host_metrics, message, network, pbd, pif, pool, sm, sr, task, vbd, vdi, vif, vm,
    vm_guest_metrics, vm_metrics, vtpm,
};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// What happened to one object: it appeared (`before` is missing), changed, or disappeared (`after` is missing).
#[derive(Debug)]
pub struct Delta<T: Class> {
    /// The object.
    pub reference: Ref<T>,
    /// Its record before.
    pub before: Option<Arc<T>>,
    /// Its record now.
    pub after: Option<Arc<T>>,
}

impl<T: Class> Clone for Delta<T> {
    fn clone(&self) -> Self {
        Self { reference: self.reference.clone(), before: self.before.clone(), after: self.after.clone() }
    }
}

/// A class whose objects an inventory can hold.
pub trait Cached: Class + FromValue + PartialEq + Send + Sync + Sized + 'static {
    /// Which one it is.
    const CLASS: ObjectClass;

    /// The record's uuid.
    fn uuid(&self) -> &str;

    #[doc(hidden)]
    fn table(tables: &Tables) -> &Table<Self>;
}

/// How an object was met in an answer.
#[derive(Clone, Debug)]
pub(super) enum Fate<T> {
    /// It exists, with this record.
    Here(Arc<T>),
    /// It exists, and its record is missing or can not be read.
    Hidden,
    /// It does not exist any more.
    Gone,
}

impl<T: FromValue> Fate<T> {
    fn of(event: Event) -> Self {
        match (event.operation, event.snapshot) {
            (Operation::Del, _) => Self::Gone,
            (_, None) => Self::Hidden,
            (_, Some(snapshot)) => match T::from_value(snapshot) {
                Ok(record) => Self::Here(Arc::new(record)),
                Err(error) => {
                    tracing::warn!(%error, class = event.class, reference = event.reference, "a record can not be read");
                    Self::Hidden
                }
            },
        }
    }
}

macro_rules! classes {
    ($($(#[$doc:meta])* $variant:ident, $module:ident, $text:literal;)*) => {
        /// A class whose objects an inventory can hold.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum ObjectClass {
            $($(#[$doc])* $variant,)*
        }

        impl ObjectClass {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in subscriptions and events.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        /// What happened to one object, by its class.
        #[derive(Clone, Debug)]
        pub enum Change {
            $($(#[$doc])* $variant(Delta<$module::Record>),)*
        }

        impl Change {
            /// The object's class.
            pub fn class(&self) -> ObjectClass {
                match self { $(Self::$variant(_) => ObjectClass::$variant,)* }
            }
        }

        $(impl Cached for $module::Record {
            const CLASS: ObjectClass = ObjectClass::$variant;

            fn uuid(&self) -> &str {
                &self.uuid
            }

            fn table(tables: &Tables) -> &Table<Self> {
                &tables.$module
            }
        })*

        /// One object as it was met in an answer.
        #[derive(Clone, Debug)]
        pub(super) enum Sighting {
            $($variant(Ref<$module::Record>, Fate<$module::Record>),)*
        }

        impl Sighting {
            /// What an event says; `None` for classes that are not modelled.
            pub(super) fn of(event: Event) -> Option<Self> {
                match event.class.as_str() {
                    $($text => {
                        let reference = Ref::new(&event.reference);
                        Some(Self::$variant(reference, Fate::of(event)))
                    })*
                    _ => None,
                }
            }

            pub(super) fn class(&self) -> ObjectClass {
                match self { $(Self::$variant(..) => ObjectClass::$variant,)* }
            }

            pub(super) fn reference(&self) -> &str {
                match self { $(Self::$variant(reference, _) => reference.as_str(),)* }
            }

            pub(super) fn exists(&self) -> bool {
                match self { $(Self::$variant(_, fate) => !matches!(fate, Fate::Gone),)* }
            }
        }

        /// The tables of all classes; cloning shares them.
        #[derive(Clone, Default)]
        #[doc(hidden)]
        pub struct Tables {
            $($module: Table<$module::Record>,)*
        }

        impl Tables {
            /// Takes one sighting over; the change, if it is one.
            pub(super) fn take(&mut self, sighting: Sighting) -> Option<Change> {
                match sighting {
                    $(Sighting::$variant(reference, fate) => self.$module.take(reference, fate).map(Change::$variant),)*
                }
            }

            /// Removes the objects of a class that are not in `seen`.
            pub(super) fn keep(&mut self, class: ObjectClass, seen: &HashSet<String>, changes: &mut Vec<Change>) {
                match class {
                    $(ObjectClass::$variant => {
                        for reference in self.$module.missing_in(seen) {
                            changes.extend(self.$module.take(reference, Fate::Gone).map(Change::$variant));
                        }
                    })*
                }
            }

            /// How many objects of a class are known to exist, with those whose record can not be read.
            pub(super) fn count(&self, class: ObjectClass) -> usize {
                match class { $(ObjectClass::$variant => self.$module.len() + self.$module.hidden.len(),)* }
            }

            /// How many objects can not be shown, because their records can not be read.
            pub(super) fn hidden(&self) -> usize {
                0 $(+ self.$module.hidden.len())*
            }
        }
    };
}

classes! {
    /// `VM`.
    Vm, vm, "vm";
    /// `VDI`.
    Vdi, vdi, "vdi";
    /// `VBD`.
    Vbd, vbd, "vbd";
    /// `VIF`.
    Vif, vif, "vif";
    /// `SR`.
    Sr, sr, "sr";
    /// `PBD`.
    Pbd, pbd, "pbd";
    /// `host`.
    Host, host, "host";
    /// `host_metrics`.
    HostMetrics, host_metrics, "host_metrics";
    /// `pool`.
    Pool, pool, "pool";
    /// `network`.
    Network, network, "network";
    /// `PIF`.
    Pif, pif, "pif";
    /// `SM`.
    Sm, sm, "sm";
    /// `task`.
    Task, task, "task";
    /// `message`.
    Message, message, "message";
    /// `VM_metrics`.
    VmMetrics, vm_metrics, "vm_metrics";
    /// `VM_guest_metrics`.
    VmGuestMetrics, vm_guest_metrics, "vm_guest_metrics";
    /// `VTPM`.
    Vtpm, vtpm, "vtpm";
    /// `Certificate`.
    Certificate, certificate, "certificate";
}

impl<T: Class + PartialEq> Table<T> {
    fn take(&mut self, reference: Ref<T>, fate: Fate<T>) -> Option<Delta<T>> {
        let before = self.objects.get(&reference).cloned();
        match fate {
            Fate::Here(after) => {
                self.unhide(&reference);
                if before.as_ref() == Some(&after) {
                    return None;
                }
                Arc::make_mut(&mut self.objects).insert(reference.clone(), Arc::clone(&after));
                Some(Delta { reference, before, after: Some(after) })
            }
            // What was known before is the best there is.
            Fate::Hidden => {
                if before.is_none() && !self.hidden.contains(&reference) {
                    Arc::make_mut(&mut self.hidden).insert(reference);
                }
                None
            }
            Fate::Gone => {
                self.unhide(&reference);
                let before = before?;
                Arc::make_mut(&mut self.objects).remove(&reference);
                Some(Delta { reference, before: Some(before), after: None })
            }
        }
    }

    fn unhide(&mut self, reference: &Ref<T>) {
        if self.hidden.contains(reference) {
            Arc::make_mut(&mut self.hidden).remove(reference);
        }
    }

    fn missing_in(&self, seen: &HashSet<String>) -> Vec<Ref<T>> {
        let known = self.objects.keys().chain(self.hidden.iter());
        known.filter(|reference| !seen.contains(reference.as_str())).cloned().collect()
    }
}

/// How many objects of each class the pool says there are; `None` where its number does not count the class.
pub(super) fn expected(class: ObjectClass, counts: &BTreeMap<String, i64>) -> Option<usize> {
    // Messages are files, not rows of the pool's database: their number is always 0.
    if class == ObjectClass::Message {
        return None;
    }
    usize::try_from(*counts.get(class.name())?).ok()
}
