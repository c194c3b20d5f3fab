//! A Ceph RADOS Gateway of one node, as an S3 service that people really run.
//!
//! Monitor, storage daemon (in memory) and gateway run as the current user in a folder of their own, without systemd and
//! without anything in `/etc`. They end with the value.

use crate::{Outcome, s3};
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Generous: the machine may be slow.
const START_LIMIT: Duration = Duration::from_secs(180);

/// Access key of the user that the gateway knows.
pub const ACCESS_KEY: &str = "xenvault-test";
/// Its secret key.
pub const SECRET_KEY: &str = "xenvault-secret-of-tests";

/// Where the storage daemon keeps its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Fast, and gone with the daemon.
    Memory,
    /// A sparse file: what was acknowledged outlives the daemon.
    Disk,
}

/// A running gateway with what it stands on.
#[derive(Debug)]
pub struct Ceph {
    folder: tempfile::TempDir,
    gateway_port: u16,
    monitor: Option<Child>,
    storage: Option<Child>,
    gateway: Option<Child>,
}

impl Ceph {
    /// Starts one.
    ///
    /// # Errors
    /// What did not start, with the command; `cargo xtask test` installs the packages.
    pub fn start() -> Outcome<Self> {
        Self::start_on(Medium::Memory)
    }

    /// Starts one that keeps its data there.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_on(medium: Medium) -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        let (monitor_port, gateway_port) = (free_port()?, free_port()?);
        let mut ceph = Self { folder, gateway_port, monitor: None, storage: None, gateway: None };
        for name in ["mon", "osd", "run"] {
            fs::create_dir(ceph.folder.path().join(name))?;
        }
        let cluster = uuid::Uuid::new_v4().to_string();
        fs::write(
            ceph.folder.path().join("ceph.conf"),
            configuration(ceph.folder.path(), &cluster, monitor_port, medium),
        )?;
        let map = ceph.folder.path().join("monmap");
        let address = format!("[v2:127.0.0.1:{monitor_port}]");
        ceph.run("monmaptool", &["--create", "--fsid", &cluster, "--addv", "a", &address, &text(&map)])?;
        ceph.run("ceph-mon", &["-i", "a", "--mkfs", "--monmap", &text(&map)])?;
        ceph.monitor = Some(ceph.spawn("ceph-mon", &["-i", "a", "-f"])?);
        let storage = uuid::Uuid::new_v4().to_string();
        ceph.run("ceph", &["--connect-timeout", "150", "osd", "new", &storage])?;
        ceph.run("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", &storage])?;
        ceph.start_storage()?;
        ceph.start_gateway()?;
        ceph.add_user("adm", ACCESS_KEY, SECRET_KEY)?;
        Ok(ceph)
    }

    /// Where the gateway answers.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.gateway_port)
    }

    /// The same, for whoever connects without a client.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.gateway_port))
    }

    /// Kills the storage daemon: what is asked of the gateway waits.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn kill_storage(&mut self) -> Outcome {
        end(&mut self.storage)
    }

    /// Starts the storage daemon, and waits until the monitor counts on it.
    ///
    /// # Errors
    /// If that does not happen within a few minutes.
    pub fn start_storage(&mut self) -> Outcome {
        self.storage = Some(self.spawn("ceph-osd", &["-i", "0", "-f"])?);
        self.wait("the storage daemon", |ceph| {
            let stat = ceph.command("ceph", &["osd", "stat"]).output();
            stat.is_ok_and(|stat| String::from_utf8_lossy(&stat.stdout).contains("1 up"))
        })
    }

    /// Lets the storage daemon stand still for a while: no request fails, none ends.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn pause_storage(&self, time: Duration) -> Outcome {
        pause(self.storage.as_ref(), time)
    }

    /// Lets the gateway stand still for a while.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn pause_gateway(&self, time: Duration) -> Outcome {
        pause(self.gateway.as_ref(), time)
    }

    /// Kills the gateway: connections break, and new ones are refused. What it has acknowledged stays.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn stop_gateway(&mut self) -> Outcome {
        end(&mut self.gateway)
    }

    /// Starts the gateway, on the same port, and waits until it answers.
    ///
    /// # Errors
    /// If it does not answer within a few minutes.
    pub fn start_gateway(&mut self) -> Outcome {
        let frontend = format!("--rgw-frontends=beast endpoint=127.0.0.1:{} tcp_nodelay=1", self.gateway_port);
        self.gateway = Some(self.spawn("radosgw", &["-n", "client.rgw", "-f", &frontend])?);
        self.wait("the gateway", |ceph| TcpStream::connect(("127.0.0.1", ceph.gateway_port)).is_ok())
    }

    /// Makes a user with keys of its own.
    ///
    /// # Errors
    /// What `radosgw-admin` says.
    pub fn add_user(&self, name: &str, access_key: &str, secret_key: &str) -> Outcome {
        let (uid, display) = (format!("--uid={name}"), format!("--display-name={name}"));
        let (access, secret) = (format!("--access-key={access_key}"), format!("--secret={secret_key}"));
        self.run("radosgw-admin", &["user", "create", &uid, &display, &access, &secret, "--caps=user-policy=*"])
    }

    /// Makes a bucket; with `lock` it keeps versions and can lock them.
    ///
    /// # Errors
    /// What the service says.
    pub fn make_bucket(&self, name: &str, lock: bool) -> Outcome {
        let lock: &[(&str, &str)] = if lock { &[("x-amz-bucket-object-lock-enabled", "true")] } else { &[] };
        let path = format!("/{name}");
        let request = s3::Request { method: "PUT", path: &path, headers: lock, ..s3::Request::default() };
        self.client().expect(request).map(drop)
    }

    /// Makes a bucket keep old versions from now on.
    ///
    /// # Errors
    /// What the service says.
    pub fn keep_versions(&self, bucket: &str) -> Outcome {
        let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        let path = format!("/{bucket}");
        let request = s3::Request {
            method: "PUT",
            path: &path,
            query: "versioning=",
            body: body.as_bytes(),
            ..s3::Request::default()
        };
        self.client().expect(request).map(drop)
    }

    /// Requests of our own, with the keys of the first user.
    pub fn client(&self) -> s3::Client {
        s3::Client {
            host: format!("127.0.0.1:{}", self.gateway_port),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
        }
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(find(program));
        command.args(arguments).env("CEPH_CONF", self.folder.path().join("ceph.conf")).stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Outcome {
        finish(&mut self.command(program, arguments))
    }

    fn spawn(&self, program: &str, arguments: &[&str]) -> Outcome<Child> {
        let mut command = self.command(program, arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command.spawn().map_err(|error| missing(program, &error))?)
    }

    fn wait(&self, what: &str, is_there: impl Fn(&Self) -> bool) -> Outcome {
        let deadline = Instant::now() + START_LIMIT;
        while !is_there(self) {
            if Instant::now() > deadline {
                return Err(format!("{what} of Ceph did not start within {} s", START_LIMIT.as_secs()).into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        for child in [&mut self.gateway, &mut self.storage, &mut self.monitor] {
            // What does not end by a kill is nothing that a test could mend.
            let _ = end(child);
        }
    }
}

fn end(child: &mut Option<Child>) -> Outcome {
    if let Some(mut child) = child.take() {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn pause(child: Option<&Child>, time: Duration) -> Outcome {
    let process = child.ok_or("it does not run")?.id().to_string();
    finish(Command::new("kill").args(["-STOP", &process]))?;
    std::thread::sleep(time);
    finish(Command::new("kill").args(["-CONT", &process]))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Daemons lie where ordinary users do not look.
fn find(program: &str) -> String {
    let places = ["/usr/bin", "/usr/sbin", "/sbin", "/bin"];
    let found = places.iter().map(|folder| format!("{folder}/{program}")).find(|path| Path::new(path).exists());
    found.unwrap_or_else(|| program.to_owned())
}

fn missing(program: &str, error: &io::Error) -> String {
    format!("{program} can not be started ({error}): `cargo xtask test` installs ceph-mon, ceph-osd and radosgw")
}

fn finish(command: &mut Command) -> Outcome {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| missing(&program, &error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{program} ended with {}: {}", output.status, String::from_utf8_lossy(&said)).into())
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn configuration(folder: &Path, cluster: &str, monitor_port: u16, medium: Medium) -> String {
    let folder = folder.display();
    let medium = match medium {
        Medium::Memory => "osd objectstore = memstore\nmemstore device bytes = 4294967296",
        Medium::Disk => "osd objectstore = bluestore\nbluestore block size = 10737418240",
    };
    format!(
        "[global]\n\
         fsid = {cluster}\n\
         mon host = v2:127.0.0.1:{monitor_port}\n\
         public addr = 127.0.0.1\n\
         ms bind msgr1 = false\n\
         auth cluster required = none\n\
         auth service required = none\n\
         auth client required = none\n\
         ms mon client mode = crc\n\
         admin socket = {folder}/run/$name.asok\n\
         log file = {folder}/run/$name.log\n\
         crash dir = {folder}/run\n\
         mon data = {folder}/mon\n\
         osd data = {folder}/osd\n\
         rgw data = {folder}/run\n\
         {medium}\n\
         osd pool default size = 1\n\
         osd crush chooseleaf type = 0\n\
         osd pool default pg num = 8\n\
         osd pool default pg autoscale mode = off\n\
         mon allow pool size one = true\n\
         mon max pg per osd = 1000\n\
         mon data avail crit = 1\n\
         paxos propose interval = 0.05\n"
    )
}
