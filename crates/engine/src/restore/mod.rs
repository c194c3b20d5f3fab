//! Restore of one VM as a new VM. Until its last step it bears a name that says so, and can not be started.

mod disk;
mod request;
mod settings;
mod target;

use std::collections::BTreeMap;
use std::sync::Arc;

use xenvault_store::{Point, Repository};
use xenvault_xenapi::{pool, vbd, vdi, vif, vm, vtpm};

pub use request::{MacPolicy, NotRestored, RestoreReport, RestoreRequest, RestoredDisk, RestoredVif, SrSelector};

use crate::config::{Device, Interface, VmConfig};
use crate::marks::{self, Marks, Role};
use crate::meter::{Direction, Meter};
use crate::monitor::Stage;
use crate::pool::{Doing as _, DoingInRepository as _, server_time, the_pool};
use crate::run::Run;
use crate::state::{Entry, Made, Operation};
use crate::{Engine, EngineError};
use disk::NewDisk;
pub(crate) use disk::data_bytes;
use target::{Networks, Target};

/// What a point says about its VM.
struct Original {
    point: Point,
    vm: vm::Record,
    devices: Vec<Device>,
    interfaces: Vec<Interface>,
    has_tpm: bool,
}

/// What was made.
struct Outcome {
    vm_uuid: String,
    disks: Vec<RestoredDisk>,
    vifs: Vec<RestoredVif>,
    not_restored: Vec<NotRestored>,
}

pub(crate) async fn run(engine: &Engine, request: RestoreRequest) -> Result<RestoreReport, EngineError> {
    let repository = engine.repository()?.clone();
    let meter = Arc::new(Meter::new(Arc::clone(&engine.options().monitor), Direction::Restore));
    meter.stage(&Stage::Prerequisites);
    let original = read_point(&repository, &request).await?;
    let session = engine.session();
    let pool = the_pool(session).await?;
    let target = Target::find(session, &pool, &request.target_sr).await?;
    let networks = Networks::read(session, &request.network_map).await?;
    let sizes = sizes(&repository, &original.point).await?;
    let virtual_bytes = original.point.disks.iter().map(|disk| disk.virtual_size).sum();
    target.check_space(virtual_bytes, sizes.iter().sum())?;
    let operation = Operation {
        kind: "restore".to_owned(),
        pool: pool.uuid.clone(),
        vm: original.point.vm_uuid.clone(),
        repository: Some(repository.id().to_string()),
        started: server_time(session, &pool).await?,
    };
    let run = Run::begin(engine, Arc::clone(&meter), None, operation)?;
    let run_id = run.id().to_owned();
    let name = request.name.clone().unwrap_or_else(|| original.vm.name_label.clone());
    let work = Work { run: &run, repository: &repository, request: &request, original: &original, name: &name };
    match Box::pin(work.all(&pool, &target, &networks, &sizes)).await {
        Ok(made) => {
            run.complete(&meter);
            Ok(RestoreReport {
                run_id,
                vm_uuid: made.vm_uuid,
                vm_name: name,
                disks: made.disks,
                vifs: made.vifs,
                not_restored: made.not_restored,
                totals: meter.progress(),
                warnings: meter.warnings(),
                elapsed: meter.elapsed(),
            })
        }
        Err(error) => {
            meter.stage(&Stage::CleanUp);
            Box::pin(run.abandon(&error)).await;
            Err(error)
        }
    }
}

async fn read_point(repository: &Repository, request: &RestoreRequest) -> Result<Original, EngineError> {
    let point = repository.point(&request.point).await.doing("read the point")?;
    let bytes = repository.blob(&point.vm_config).await.doing("read the VM's configuration")?;
    let id = point.id.to_string();
    let config = VmConfig::from_bytes(&id, &bytes)?;
    Ok(Original {
        vm: config.vm(&id)?,
        devices: config.devices(&id)?,
        interfaces: config.interfaces(&id)?,
        has_tpm: config.has_tpm(),
        point,
    })
}

/// Bytes of data of each disk.
async fn sizes(repository: &Repository, point: &Point) -> Result<Vec<u64>, EngineError> {
    let mut sizes = Vec::with_capacity(point.disks.len());
    for disk in &point.disks {
        sizes.push(data_bytes(&repository.disk(&disk.map)).await?);
    }
    Ok(sizes)
}

struct Work<'a> {
    run: &'a Run,
    repository: &'a Repository,
    request: &'a RestoreRequest,
    original: &'a Original,
    name: &'a str,
}

impl Work<'_> {
    async fn all(
        &self,
        pool: &pool::Record,
        target: &Target,
        networks: &Networks,
        sizes: &[u64],
    ) -> Result<Outcome, EngineError> {
        let run = self.run;
        run.meter.stage(&Stage::CreateVm);
        let marks = self.marks();
        let (vm, vm_uuid) = self.create_vm(&marks).await?;
        let mut not_restored = settings::left_out(&self.original.vm);
        self.set_afterwards(&vm, &mut not_restored).await?;
        let mut disks = Vec::new();
        for stored in &self.original.point.disks {
            let original = self.device(&stored.device).and_then(|device| device.vdi.as_ref());
            not_restored.extend(original.into_iter().flat_map(|disk| settings::disk_left_out(&stored.device, disk)));
            disks.push(disk::create(run, target, stored, original, &marks).await?);
        }
        self.attach(&vm, &disks).await?;
        let vifs = self.interfaces(&vm, networks).await?;
        sizes.iter().for_each(|&bytes| run.meter.plan(bytes));
        let mut restored = Vec::new();
        for ((new, stored), &data) in disks.iter().zip(&self.original.point.disks).zip(sizes) {
            let reader = self.repository.disk(&stored.map);
            restored.push(Box::pin(disk::fill(run, target, new, &reader, data)).await?);
            disk::verify(run, new, stored, &reader).await?;
        }
        run.meter.stage(&Stage::Finish);
        for new in &disks {
            self.finish_disk(new).await?;
        }
        self.finish_vm(pool, &vm, &mut not_restored).await?;
        Ok(Outcome { vm_uuid, disks: restored, vifs, not_restored })
    }

    fn marks(&self) -> Marks {
        Marks {
            instance: self.run.engine.instance().to_owned(),
            run: self.run.id().to_owned(),
            role: Role::Restore,
            vm: self.original.point.vm_uuid.clone(),
            repository: Some(self.repository.id().to_string()),
            resume_until: None,
        }
    }

    fn device(&self, userdevice: &str) -> Option<&Device> {
        self.original.devices.iter().find(|device| device.vbd.userdevice == userdevice)
    }

    async fn create_vm(&self, marks: &Marks) -> Result<(vm::Ref, String), EngineError> {
        let (run, session) = (self.run, self.run.session());
        let name =
            marks::operation_name(&format!("Xenvault restore of {}", self.name), run.engine.instance(), run.id());
        let record = settings::creation_record(&self.original.vm, &name)?;
        run.intend(Made::Vm, &name)?;
        let vm = vm::create(session, &record).await.doing("create the VM")?;
        let made = vm::get_record(session, &vm).await.doing("read the new VM's record")?;
        run.created(Made::Vm, &made.uuid)?;
        // `made` has what the pool itself put there, such as a new seed for MAC addresses.
        let mut config = made.other_config;
        config.extend(settings::other_config(&self.original.vm.other_config));
        let config = marks.applied(&made.uuid, &config);
        vm::set_other_config(session, &vm, &config).await.doing("mark the new VM")?;
        Ok((vm, made.uuid))
    }

    /// Settings that creation does not take.
    async fn set_afterwards(&self, vm: &vm::Ref, left: &mut Vec<NotRestored>) -> Result<(), EngineError> {
        let (session, original) = (self.run.session(), &self.original.vm);
        vm::set_memory_limits(
            session,
            vm,
            original.memory_static_min,
            original.memory_static_max,
            original.memory_dynamic_min,
            original.memory_dynamic_max,
        )
        .await
        .doing("set the VM's memory")?;
        let (bios, incomplete) = settings::bios_strings(&original.bios_strings);
        if incomplete {
            let reason = "strings of the original's hardware can not be set by a client".to_owned();
            left.push(NotRestored { field: "bios_strings".to_owned(), reason });
        }
        if !bios.is_empty()
            && let Err(error) = vm::set_bios_strings(session, vm, &bios).await
        {
            left.push(NotRestored { field: "bios_strings".to_owned(), reason: error.to_string() });
        }
        if self.original.has_tpm {
            self.make_tpm(vm, left).await?;
        }
        Ok(())
    }

    /// The content of a TPM never leaves the pool: the new VM gets an empty one, unless it has got one by itself.
    async fn make_tpm(&self, vm: &vm::Ref, left: &mut Vec<NotRestored>) -> Result<(), EngineError> {
        let session = self.run.session();
        let present = vm::get_record(session, vm).await.doing("read the new VM's record")?.vtpms;
        let mut reason = "its secrets can not be read by a client: the new VM has an empty one, so keep recovery keys \
                          for encrypted disks at hand"
            .to_owned();
        if present.is_empty()
            && let Err(error) = vtpm::create(session, vm, false).await
        {
            reason = format!("the new VM has none: {error}");
        }
        left.push(NotRestored { field: "VTPMs".to_owned(), reason });
        Ok(())
    }

    async fn attach(&self, vm: &vm::Ref, disks: &[NewDisk]) -> Result<(), EngineError> {
        for device in &self.original.devices {
            let disk = disks.iter().find(|disk| disk.device == device.vbd.userdevice);
            let is_cd = device.vbd.type_ == vbd::Type::Cd;
            if disk.is_none() && !is_cd {
                continue;
            }
            let record = vbd::Record {
                vm: vm.clone(),
                vdi: disk.map_or_else(vdi::Ref::null, |disk| disk.reference.clone()),
                empty: disk.is_none(),
                userdevice: device.vbd.userdevice.clone(),
                bootable: device.vbd.bootable,
                mode: device.vbd.mode.clone(),
                type_: device.vbd.type_.clone(),
                unpluggable: device.vbd.unpluggable,
                qos_algorithm_type: device.vbd.qos_algorithm_type.clone(),
                qos_algorithm_params: device.vbd.qos_algorithm_params.clone(),
                other_config: settings::other_config(&device.vbd.other_config),
                ..Default::default()
            };
            vbd::create(self.run.session(), &record)
                .await
                .doing(format!("make device {} of the new VM", device.vbd.userdevice))?;
        }
        Ok(())
    }

    async fn interfaces(&self, vm: &vm::Ref, networks: &Networks) -> Result<Vec<RestoredVif>, EngineError> {
        let mut made = Vec::new();
        for interface in &self.original.interfaces {
            made.push(self.interface(vm, interface, networks).await?);
        }
        Ok(made)
    }

    async fn interface(
        &self,
        vm: &vm::Ref,
        interface: &Interface,
        networks: &Networks,
    ) -> Result<RestoredVif, EngineError> {
        let session = self.run.session();
        let mut report = RestoredVif {
            device: interface.vif.device.clone(),
            network: interface.network_name.clone(),
            mapped_to: None,
            mac: None,
        };
        let Some((network, name)) = networks.of(interface) else {
            self.run.meter.warn(
                "network-not-mapped",
                format!(
                    "interface {} was on network {:?}, which this pool does not have (or has twice); it is left out. \
                     Map the network to restore it",
                    interface.vif.device, interface.network_name
                ),
            );
            return Ok(report);
        };
        let record = vif::Record {
            vm: vm.clone(),
            network,
            device: interface.vif.device.clone(),
            mac: networks.mac(self.request.mac, &interface.vif.mac),
            mtu: interface.vif.mtu,
            locking_mode: interface.vif.locking_mode.clone(),
            ipv4_allowed: interface.vif.ipv4_allowed.clone(),
            ipv6_allowed: interface.vif.ipv6_allowed.clone(),
            qos_algorithm_type: interface.vif.qos_algorithm_type.clone(),
            qos_algorithm_params: interface.vif.qos_algorithm_params.clone(),
            other_config: settings::other_config(&interface.vif.other_config),
            ..Default::default()
        };
        let created = vif::create(session, &record)
            .await
            .doing(format!("make interface {} of the new VM", interface.vif.device))?;
        let now = vif::get_record(session, &created).await.doing("read a new interface's record")?;
        report.mapped_to = Some(name);
        report.mac = Some(now.mac);
        Ok(report)
    }

    async fn finish_disk(&self, disk: &NewDisk) -> Result<(), EngineError> {
        let session = self.run.session();
        vdi::set_name_label(session, &disk.reference, &disk.name).await.doing("name a new disk")?;
        let clean = marks::without_marks(&disk.record.other_config);
        vdi::set_other_config(session, &disk.reference, &clean).await.doing("take the marks off a new disk")
    }

    /// Name, marks, high availability; the permission to start is the very last.
    async fn finish_vm(
        &self,
        pool: &pool::Record,
        vm: &vm::Ref,
        left: &mut Vec<NotRestored>,
    ) -> Result<(), EngineError> {
        let (run, session, original) = (self.run, self.run.session(), &self.original.vm);
        vm::set_name_label(session, vm, self.name).await.doing("name the new VM")?;
        let present = vm::get_other_config(session, vm).await.doing("read the new VM's marks")?;
        let clean: BTreeMap<String, String> = marks::without_marks(&present);
        vm::set_other_config(session, vm, &clean).await.doing("take the marks off the new VM")?;
        run.journal()?.write(&Entry::Published { point: self.original.point.id.to_string() })?;
        // From here on the VM is good: what fails is reported and removes nothing.
        if !original.ha_restart_priority.is_empty() {
            let set = vm::set_ha_restart_priority(session, vm, &original.ha_restart_priority).await;
            if let Err(error) = set {
                left.push(NotRestored { field: "ha_restart_priority".to_owned(), reason: error.to_string() });
            } else if !pool.ha_enabled {
                tracing::debug!("the pool has no high availability at the moment");
            }
        }
        let blocked = &original.blocked_operations;
        if let Err(error) = vm::set_blocked_operations(session, vm, blocked).await {
            run.meter.warn(
                "start-still-blocked",
                format!(
                    "the new VM is complete, but it still refuses to start ({error}); lift that with `xe \
                     vm-param-clear param-name=blocked-operations uuid=...`"
                ),
            );
        }
        Ok(())
    }
}
