//! Two network namespaces, `cloud` and `edge`, and a WAN between them that lives in this process.
//!
//! Without delay the WAN is a veth pair. With it, each namespace has a tun device and two threads carry packets across:
//! late, lost at random, or not at all. Names carry this process's id, everything goes when the value is dropped, and
//! nothing outside the two namespaces is touched.

use nix::sched::{CloneFlags, setns};
use std::{
    collections::{HashSet, VecDeque},
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The server's side.
pub const CLOUD: &str = "10.0.0.1";
/// The node's side.
pub const EDGE: &str = "10.0.0.2";
/// The server's side, IPv6.
pub const CLOUD6: &str = "fd00::1";

/// What the WAN does to packets, changed while it runs.
#[derive(Default)]
pub struct Weather {
    /// One way, microseconds.
    delay: AtomicU64,
    /// Lost, of a million, each way.
    loss: AtomicU32,
    blackhole: AtomicBool,
    flows: Mutex<Flows>,
    stop: AtomicBool,
}

/// A flow by its two ports: those that have been seen, and those that nothing knows any more.
type Flows = (HashSet<[u8; 4]>, HashSet<[u8; 4]>);

pub struct Wan {
    name: String,
    pub weather: Arc<Weather>,
    threads: Vec<JoinHandle<()>>,
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    // Without the privilege this fails, here and in CI: a skipped test looks like a passed one.
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Removes the namespaces of runs that were killed: those whose process is gone.
fn sweep() {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let process = name.strip_prefix("etun").and_then(|rest| rest.split_once('-'));
        // Only names that are made here: a process id comes first.
        let process = process.and_then(|(process, _)| process.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            // Another run may be sweeping as well.
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Wan {
    /// A WAN with this round trip and this loss each way, in parts of a million. Neither: a veth pair.
    pub fn new(round_trip: Duration, loss: u32) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        SWEPT.call_once(sweep);
        let name = format!("etun{}-{}", std::process::id(), COUNT.fetch_add(1, SeqCst));
        let weather = Arc::new(Weather::default());
        weather.loss.store(loss, SeqCst);
        weather.delay.store(u64::try_from(round_trip.as_micros()).unwrap() / 2, SeqCst);
        let mut wan = Self { name, weather, threads: Vec::new() };
        for side in ["cloud", "edge"] {
            run(&format!("ip netns add {}", wan.side(side)));
            run(&format!("ip -n {} link set lo up", wan.side(side)));
        }
        if round_trip.is_zero() && loss == 0 {
            run(&format!(
                "ip -n {} link add wan type veth peer name wan netns {}",
                wan.side("cloud"),
                wan.side("edge")
            ));
            wan.address("wan");
        } else {
            let [cloud, edge] = ["cloud", "edge"].map(|side| wan.inside(side, tun).join().unwrap());
            wan.address("wan");
            let ends = [(cloud.try_clone().unwrap(), edge.try_clone().unwrap()), (edge, cloud)];
            for (from, to) in ends {
                wan.carry(from, to);
            }
        }
        wan
    }

    fn address(&self, device: &str) {
        for (side, v4, v6) in [("cloud", CLOUD, CLOUD6), ("edge", EDGE, "fd00::2")] {
            let ns = self.side(side);
            run(&format!("ip -n {ns} addr add {v4}/24 dev {device}"));
            run(&format!("ip -n {ns} addr add {v6}/64 dev {device} nodad"));
            run(&format!("ip -n {ns} link set {device} mtu 1500 up"));
        }
    }

    /// The name of a namespace.
    pub fn side(&self, side: &str) -> String {
        format!("{}-{side}", self.name)
    }

    /// Runs something on a thread inside a namespace.
    pub fn inside<T: Send + 'static>(
        &self,
        side: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let ns = File::open(format!("/run/netns/{}", self.side(side))).unwrap();
        std::thread::spawn(move || {
            setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        })
    }

    /// A command that runs inside a namespace.
    pub fn command(&self, side: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.side(side))).arg("--");
        // It ends with us, also when we are killed.
        command.args(["setpriv", "--pdeathsig", "KILL", "--"]).arg(program);
        command
    }

    fn carry(&mut self, mut from: File, mut to: File) {
        let weather = self.weather.clone();
        let queue = Arc::new((Mutex::new(VecDeque::<(Instant, Vec<u8>)>::new()), std::sync::Condvar::new()));
        let (queued, stop) = (queue.clone(), weather.clone());
        self.threads.push(std::thread::spawn(move || {
            while !stop.stop.load(SeqCst) {
                let mut waiting = queued.0.lock().unwrap();
                let Some((due, _)) = waiting.front() else {
                    drop(queued.1.wait_timeout(waiting, Duration::from_millis(100)).unwrap());
                    continue;
                };
                let wait = due.saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    drop(waiting);
                    std::thread::sleep(wait);
                    continue;
                }
                let packet = waiting.pop_front().unwrap().1;
                drop(waiting);
                let _ = to.write_all(&packet);
            }
        }));
        self.threads.push(std::thread::spawn(move || {
            let mut random = fastrand::Rng::new();
            let mut buffer = vec![0; 2048];
            while !weather.stop.load(SeqCst) {
                let mut fds =
                    [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&from), nix::poll::PollFlags::POLLIN)];
                if nix::poll::poll(&mut fds, 100u16).unwrap_or(0) == 0 {
                    continue;
                }
                let Ok(length) = from.read(&mut buffer) else { continue };
                if weather.drops(&buffer[..length], &mut random) {
                    continue;
                }
                let due = Instant::now() + Duration::from_micros(weather.delay.load(SeqCst));
                let mut waiting = queue.0.lock().unwrap();
                // The queue of a real router has an end as well.
                if waiting.len() < 20_000 {
                    waiting.push_back((due, buffer[..length].to_vec()));
                    queue.1.notify_one();
                }
            }
        }));
    }
}

impl Weather {
    /// Nothing gets through, or everything does again.
    pub fn blackhole(&self, yes: bool) {
        self.blackhole.store(yes, SeqCst);
    }

    /// Nothing gets through any more on the flows there are; new ones do. What a NAT does that lost its mappings.
    pub fn forget_flows(&self) {
        let mut flows = self.flows.lock().unwrap();
        let known = std::mem::take(&mut flows.0);
        flows.1.extend(known);
    }

    fn drops(&self, packet: &[u8], random: &mut fastrand::Rng) -> bool {
        if self.blackhole.load(SeqCst) || random.u32(..1_000_000) < self.loss.load(SeqCst) {
            return true;
        }
        // The two ports of TCP over IPv4, in one order for both directions.
        if packet.len() < 24 || packet[0] != 0x45 || packet[9] != 6 {
            return false;
        }
        let (a, b) = ([packet[20], packet[21]], [packet[22], packet[23]]);
        let [[w, x], [y, z]] = if a < b { [a, b] } else { [b, a] };
        let mut flows = self.flows.lock().unwrap();
        if flows.1.contains(&[w, x, y, z]) {
            return true;
        }
        flows.0.insert([w, x, y, z]);
        false
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        self.weather.stop.store(true, SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for side in ["cloud", "edge"] {
            let _ = Command::new("ip").args(["netns", "del", &self.side(side)]).output();
        }
    }
}

/// A tun device called `wan` in the namespace of the calling thread.
#[allow(unsafe_code, reason = "only an ioctl makes a tun device")]
fn tun() -> File {
    const TUNSETIFF: nix::libc::Ioctl = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..3].copy_from_slice(b"wan");
    // IFF_TUN | IFF_NO_PI
    request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
    // SAFETY: the descriptor is open, and the request is a whole struct ifreq that outlives the call.
    let result = unsafe { nix::libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}
