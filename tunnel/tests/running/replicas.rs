//! Several replicas as processes, each in a namespace of its own, agents and load balancers in another, on one bridge.
//!
//! Names carry this process's id; dropping the value ends every process and removes every namespace. What is cut is cut
//! by routes inside those namespaces.

use crate::common::*;
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::HashMap,
    fs::File,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::oneshot,
    time::{Instant, sleep, timeout},
};

const BINARY: &str = env!("CARGO_BIN_EXE_edge-tunnel");

/// Where agents dial: the load balancer.
pub const BALANCER: &str = "10.1.0.1:8443";

/// How a load balancer chooses.
#[derive(Clone, Copy, PartialEq)]
pub enum Balance {
    /// One after the other.
    Round,
    /// One source, one replica. (Every agent of a test has one address: so all of them land on one.)
    Affine,
}

/// The world of several replicas.
pub struct Cloud {
    pub world: World,
    name: String,
    pub replicas: Mutex<HashMap<u8, Replica>>,
    balancer: Arc<Balancer>,
    agents: Option<(oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
    peers: String,
}

/// One replica's process.
pub struct Replica {
    pub child: Child,
    pub socket: PathBuf,
    pub log: PathBuf,
}

impl Replica {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who is behind the load balancer, and who has been asked last.
#[derive(Default)]
struct Balancer {
    behind: Mutex<Vec<u8>>,
    next: AtomicUsize,
    dials: AtomicUsize,
}

fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The address of a replica.
pub fn address(replica: u8) -> IpAddr {
    format!("10.1.0.{}", 10 + replica).parse().unwrap()
}

impl Cloud {
    /// A bridge, and a load balancer with nobody behind it.
    pub fn new(balance: Balance) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let world = World::new();
        let name = format!("etunha{}-{}", std::process::id(), COUNT.fetch_add(1, SeqCst));
        let peers: Vec<_> = (1..=4).map(|replica| format!("{}:9443", address(replica))).collect();
        let balancer = Arc::new(Balancer::default());
        let cloud = Self {
            world,
            name,
            replicas: Mutex::default(),
            balancer: balancer.clone(),
            agents: None,
            peers: peers.join(","),
        };
        let ns = cloud.namespace(0);
        run(&format!("ip netns add {ns}"));
        run(&format!("ip -n {ns} link set lo up"));
        run(&format!("ip -n {ns} link add br0 type bridge"));
        run(&format!("ip -n {ns} addr add 10.1.0.1/24 dev br0"));
        run(&format!("ip -n {ns} link set br0 up"));
        drop(cloud.inside(0, move || balance_all(balance, &balancer)));
        cloud
    }

    /// With this many replicas, ready, and this many agents behind the load balancer.
    pub async fn with(balance: Balance, replicas: u8, agents: usize) -> Self {
        let mut cloud = Self::new(balance);
        for replica in 1..=replicas {
            cloud.start(replica);
        }
        for replica in 1..=replicas {
            cloud.ready(replica).await;
        }
        cloud.agents(agents);
        cloud
    }

    fn namespace(&self, replica: u8) -> String {
        format!("{}-{replica}", self.name)
    }

    /// Runs something on a thread inside a namespace; 0 is that of agents and load balancer.
    fn inside<T: Send + 'static>(
        &self,
        replica: u8,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let ns = File::open(format!("/run/netns/{}", self.namespace(replica))).unwrap();
        std::thread::spawn(move || {
            setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        })
    }

    /// Starts a replica.
    pub fn start(&self, replica: u8) {
        let (world, ns, own) = (&self.world, self.namespace(replica), address(replica));
        if !Path::new("/run/netns").join(&ns).exists() {
            run(&format!("ip netns add {ns}"));
            run(&format!("ip -n {ns} link set lo up"));
            run(&format!(
                "ip -n {} link add r{replica} type veth peer name eth0 netns {ns}",
                self.namespace(0)
            ));
            run(&format!("ip -n {} link set r{replica} master br0 up", self.namespace(0)));
            run(&format!("ip -n {ns} addr add {own}/24 dev eth0"));
            run(&format!("ip -n {ns} link set eth0 up"));
        }
        let dir = world.dir.path();
        let (pair, peer) = (world.pki.pair("server"), world.pki.pair("peer"));
        let socket = dir.join(format!("egress-{replica}.sock"));
        let log = dir.join(format!("log-{replica}"));
        let child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{ns}"))
            .args(["--", BINARY, "server", "--listen=:8443", "--peer-listen=:9443", "--drain=12s"])
            .arg(format!("--replica-id=r{replica}"))
            .arg(format!("--peers={}", self.peers))
            .arg(format!("--metrics-listen={own}:10267"))
            .args([Path::new("--tls-cert"), &pair.cert, Path::new("--tls-key"), &pair.key])
            .args([Path::new("--peer-cert"), &peer.cert, Path::new("--peer-key"), &peer.key])
            .args([
                Path::new("--peer-ca"),
                &world.pki.ca("peer"),
                Path::new("--agent-ca"),
                &world.pki.ca("agent"),
            ])
            .args([Path::new("--egress-socket"), &socket])
            .env("RUST_LOG", "info")
            .stderr(File::options().create(true).append(true).open(&log).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.replicas.lock().unwrap().insert(replica, Replica { child, socket, log });
    }

    /// The load balancer sends nobody there any more.
    pub fn withdraw(&self, replica: u8) {
        self.balancer.behind.lock().unwrap().retain(|other| *other != replica);
    }

    /// Waits until it says that it is ready; from then on it is behind the load balancer.
    pub async fn ready(&self, replica: u8) {
        within(Duration::from_secs(20), async {
            while self.page(replica, "/readyz").await.0 != 200 {
                sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        let mut behind = self.balancer.behind.lock().unwrap();
        behind.retain(|other| *other != replica);
        behind.push(replica);
    }

    /// A page of a replica; code 0 when nobody answers.
    pub async fn page(&self, replica: u8, path: &str) -> (u16, String) {
        let path = path.to_owned();
        let asked = self.inside(0, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let to = SocketAddr::new(address(replica), 10267);
                match timeout(Duration::from_secs(2), TcpStream::connect(to)).await {
                    Ok(Ok(_)) => timeout(Duration::from_secs(2), page(to, &path)).await.unwrap_or_default(),
                    _ => Default::default(),
                }
            })
        });
        tokio::task::spawn_blocking(move || asked.join().unwrap_or_default()).await.unwrap()
    }

    /// The value of a metric without labels.
    pub async fn metric(&self, replica: u8, name: &str) -> f64 {
        let (_, text) = self.page(replica, "/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(f64::NAN, |value| value.parse().unwrap())
    }

    /// How many sessions it has; none when it is not there.
    pub async fn sessions(&self, replica: u8) -> usize {
        let (_, body) = self.page(replica, "/sessions").await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        body["sessions"].as_array().map_or(0, Vec::len)
    }

    /// Starts agents node0, node1, …, each with a kubelet that echoes.
    pub fn agents(&mut self, count: usize) {
        let configs: Vec<_> = (0..count)
            .map(|number| {
                let name = format!("node{number}");
                self.world.pki.node(&name);
                self.world.agent_config(&name, BALANCER.parse().unwrap(), "127.0.0.1:10250".parse().unwrap())
            })
            .collect();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = self.inside(0, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let kubelet = echo().await;
                let agents = configs
                    .into_iter()
                    .map(|config| spawn_agent(tunnel::config::agent::AgentConfig { kubelet, ..config }));
                let _agents: Vec<Dropped> = agents.collect();
                let _ = stopped.await;
            });
        });
        self.agents = Some((stop, thread));
    }

    /// Starts one more agent of a node, with a kubelet that says a word, until the value is dropped.
    pub fn clone_of(&self, node: &str, word: &'static [u8]) -> oneshot::Sender<()> {
        self.world.pki.node(node);
        let config = self.world.agent_config(node, BALANCER.parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        drop(self.inside(0, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let kubelet = serve(move |mut socket| async move {
                    use tokio::io::{AsyncReadExt, AsyncWriteExt};
                    let _ = socket.write_all(word).await;
                    // All of what the caller says: closing before would be a reset, which may overtake the word.
                    let _ = socket.read_exact(&mut [0; 5]).await;
                })
                .await;
                let _agent = spawn_agent(tunnel::config::agent::AgentConfig { kubelet, ..config });
                let _ = stopped.await;
            });
        }));
        stop
    }

    /// CONNECT to a node through a replica.
    pub async fn connect(&self, replica: u8, node: &str) -> Result<UnixStream, String> {
        let socket = self.replicas.lock().unwrap().get(&replica).map(|replica| replica.socket.clone());
        let socket = socket.ok_or("no such replica")?;
        let mut stream = UnixStream::connect(&socket).await.map_err(|error| error.to_string())?;
        ask(&mut stream, &format!("{node}:10250")).await.map(|()| stream)
    }

    /// Waits until every one of these replicas serves every one of so many nodes.
    pub async fn everywhere(&self, replicas: &[u8], nodes: usize, most: Duration) {
        within(most, async {
            for replica in replicas {
                for node in 0..nodes {
                    while let Err(_why) = self.connect(*replica, &format!("node{node}")).await {
                        sleep(Duration::from_millis(50)).await;
                    }
                }
            }
        })
        .await;
    }

    /// Nothing gets from one replica to the other any more, or does again.
    pub fn cut(&self, a: u8, b: u8, yes: bool) {
        let what = if yes { "add" } else { "del" };
        for (from, to) in [(a, b), (b, a)] {
            run(&format!("ip -n {} route {what} blackhole {}/32", self.namespace(from), address(to)));
        }
    }

    /// The cable of a replica is pulled: nobody is told.
    pub fn unplug(&self, replica: u8) {
        run(&format!("ip -n {} link set r{replica} down", self.namespace(0)));
    }

    /// How often agents have dialled.
    pub fn dials(&self) -> usize {
        self.balancer.dials.load(SeqCst)
    }

    /// What a replica has logged.
    pub fn log(&self, replica: u8) -> String {
        let log = self.replicas.lock().unwrap()[&replica].log.clone();
        std::fs::read_to_string(log).unwrap()
    }

    /// SIGTERM, and then what Kubernetes does: it is taken from the load balancer a little later. Until it has ended.
    pub async fn stop(&self, replica: u8) {
        self.replicas.lock().unwrap()[&replica].signal(Signal::SIGTERM);
        sleep(Duration::from_secs(1)).await;
        self.withdraw(replica);
        within(Duration::from_secs(20), async {
            loop {
                if let Some(status) =
                    self.replicas.lock().unwrap().get_mut(&replica).unwrap().child.try_wait().unwrap()
                {
                    assert!(status.success(), "{status}");
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        self.replicas.lock().unwrap().remove(&replica);
    }

    /// kill -9; the load balancer notices after a second.
    pub async fn kill(&self, replica: u8) {
        self.replicas.lock().unwrap().remove(&replica);
        sleep(Duration::from_secs(1)).await;
        self.withdraw(replica);
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (number, replica) in self.replicas.lock().unwrap().iter() {
                let log = std::fs::read_to_string(&replica.log).unwrap_or_default();
                let lines: Vec<_> = log.lines().filter(|line| !line.contains("stream caller")).collect();
                eprintln!("r{number}:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
        }
        if let Some((stop, thread)) = self.agents.take() {
            drop(stop);
            let _ = thread.join();
        }
        self.replicas.lock().unwrap().clear();
        for replica in 0..=4 {
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(replica)]).output();
        }
    }
}

/// A load balancer that passes TCP through.
fn balance_all(balance: Balance, balancer: &Arc<Balancer>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind(BALANCER).await.unwrap();
        loop {
            let Ok((mut near, _)) = listener.accept().await else { return };
            balancer.dials.fetch_add(1, SeqCst);
            let number = if balance == Balance::Round { balancer.next.fetch_add(1, SeqCst) } else { 0 };
            let chosen = {
                let behind = balancer.behind.lock().unwrap();
                behind.get(number % behind.len().max(1)).copied()
            };
            let Some(chosen) = chosen else { continue };
            tokio::spawn(async move {
                let to = SocketAddr::new(address(chosen), 8443);
                let Ok(Ok(mut far)) = timeout(Duration::from_secs(2), TcpStream::connect(to)).await else {
                    return;
                };
                for socket in [&near, &far] {
                    let _ = socket.set_nodelay(true);
                }
                let _ = copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
}

/// Callers that never stop: each asks for a node through a replica that says it is ready, and counts what fails.
pub struct Load {
    stop: Arc<AtomicBool>,
    pub done: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<(Instant, String)>>>,
    tasks: tokio::task::JoinSet<()>,
}

impl Load {
    /// So many callers, one dial after the other with this pause between, to so many nodes.
    pub fn start(cloud: &Arc<Cloud>, callers: usize, pause: Duration, nodes: usize) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            done: Arc::default(),
            failures: Arc::default(),
            tasks: tokio::task::JoinSet::new(),
        };
        for caller in 0..callers {
            let (stop, done, failures, cloud) =
                (load.stop.clone(), load.done.clone(), load.failures.clone(), cloud.clone());
            load.tasks.spawn(async move {
                let mut number = caller;
                while !stop.load(SeqCst) {
                    number += 1;
                    let behind = cloud.balancer.behind.lock().unwrap().clone();
                    let Some(&replica) = behind.get(number % behind.len().max(1)) else { continue };
                    let node = format!("node{}", fastrand::usize(..nodes));
                    let word = async {
                        use tokio::io::{AsyncReadExt, AsyncWriteExt};
                        let mut stream = cloud.connect(replica, &node).await?;
                        let mut back = [0; 5];
                        let said = async {
                            stream.write_all(b"hello").await?;
                            stream.read_exact(&mut back).await
                        };
                        said.await.map(drop).map_err(|error| format!("after the 200: {error}"))
                    };
                    if let Err(why) = word.await {
                        failures
                            .lock()
                            .unwrap()
                            .push((Instant::now(), format!("{node} through r{replica}: {why}")));
                    }
                    done.fetch_add(1, SeqCst);
                    sleep(pause).await;
                }
            });
        }
        load
    }

    /// Waits until so many more have been made.
    pub async fn more(&self, dials: usize, most: Duration) {
        let until = self.done.load(SeqCst) + dials;
        within(most, async {
            while self.done.load(SeqCst) < until {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Ends it: what has failed, and when.
    pub async fn end(mut self) -> Vec<(Instant, String)> {
        self.stop.store(true, SeqCst);
        while self.tasks.join_next().await.is_some() {}
        std::mem::take(&mut self.failures.lock().unwrap())
    }
}
