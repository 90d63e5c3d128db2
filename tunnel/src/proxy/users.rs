//! Who may use the proxy: `[{"name": "prometheus", "hash": "$2y$…", "ports": [10250, 9100]}]`, followed.
//!
//! A bcrypt costs 50 ms and more of a core, on purpose, and anybody may send passwords. So a password that was right is
//! remembered, in memory, for as long as its user's line in the file is; a scraper pays once. Whatever must be computed
//! is computed on threads of its own, few at a time; the same password at the same time once; at most one of a user's
//! at a time, so that guessing at one user's does not hold up another's; and beyond [`WAITING`] different ones of a user
//! the next is turned away at once. Names that nobody has are one user more, who takes as long and is never right.

use super::request::Credentials;
use crate::{
    refusal::{Reason, Refusal},
    tls::follow::Followed,
};
use serde::Deserialize;
use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};
use subtle::ConstantTimeEq;
use tokio::sync::{OnceCell, Semaphore};

/// Different passwords of one user that may wait to be tried.
pub const WAITING: usize = 32;

/// What a bcrypt may cost, as a power of two: 14 is a second.
const COSTS: std::ops::RangeInclusive<u32> = 4..=14;

/// The longest name of a user, and the longest password that is looked at, bytes. (bcrypt reads 72.)
const NAME_LIMIT: usize = 64;
const PASSWORD_LIMIT: usize = 1024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    hash: String,
    #[serde(default)]
    ports: Vec<u16>,
}

/// The users file, and what is being tried.
pub struct Users {
    file: Followed<Table>,
    computing: Arc<Semaphore>,
}

/// What the file says.
#[derive(Debug)]
struct Table {
    users: HashMap<Box<str>, Arc<User>>,
    nobody: Arc<User>,
}

/// One user.
pub struct User {
    /// The name.
    pub name: Box<str>,
    hash: Box<str>,
    ports: Box<[u16]>,
    /// The password that was right.
    remembered: OnceLock<Box<[u8]>>,
    turn: Arc<Semaphore>,
    trying: Mutex<Trying>,
}

/// Passwords that are being tried, and what will come of each.
type Trying = HashMap<Box<[u8]>, Arc<OnceCell<bool>>>;

/// Without hash and password.
impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.name, self.ports)
    }
}

/// Reads the list.
///
/// # Errors
/// The first thing that is wrong with it, without the hash.
fn parse(bytes: &[u8]) -> Result<Table, String> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("it is empty; a list without users is written []".into());
    }
    let list: Vec<Written> =
        serde_json::from_slice(bytes).map_err(|error| without_quotation(&error.to_string()))?;
    let mut users = HashMap::new();
    let mut highest = *COSTS.start();
    for written in list {
        let (user, cost) = written.check()?;
        highest = highest.max(cost);
        let name = user.name.clone();
        if users.insert(name.clone(), Arc::new(user)).is_some() {
            return Err(format!("user {name} comes twice"));
        }
    }
    // The hash of no password that anybody knows; a name that nobody has takes as long as one that somebody has.
    let nobody = User::new("-", &format!("$2b${highest:02}${}", "e".repeat(53)), Vec::new());
    Ok(Table { users, nobody: Arc::new(nobody) })
}

/// What an error says, but for the text that it quotes: a hash, or a password in the wrong place.
fn without_quotation(said: &str) -> String {
    match (said.split_once('"'), said.rsplit_once('"')) {
        (Some((before, _)), Some((_, after))) => format!("{before}…{after}"),
        _ => said.to_owned(),
    }
}

impl Written {
    fn check(self) -> Result<(User, u32), String> {
        let Self { name, hash, ports } = self;
        let graphic = |byte: u8| byte.is_ascii_graphic() && byte != b':';
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(graphic) {
            return Err(format!(
                "{name:?} is no user's name: 1 to {NAME_LIMIT} letters, digits or signs, no colon"
            ));
        }
        let wrong = || {
            format!("user {name}: the hash is not bcrypt's, such as `htpasswd -nbB {name} PASSWORD` makes")
        };
        let cost = cost(&hash).ok_or_else(wrong)?;
        if !COSTS.contains(&cost) {
            return Err(format!(
                "user {name}: the hash costs 2^{cost}; {} to {} are let through, a try must not take seconds",
                COSTS.start(),
                COSTS.end()
            ));
        }
        if ports.contains(&0) {
            return Err(format!("user {name}: 0 is no port"));
        }
        Ok((User::new(&name, &hash, ports), cost))
    }
}

/// The cost of a hash `$2b$10$` with 53 letters after it; none when it is not one.
fn cost(hash: &str) -> Option<u32> {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'/';
    let rest = ["$2a$", "$2b$", "$2y$"].iter().find_map(|prefix| hash.strip_prefix(prefix))?;
    let (cost, rest) = rest.split_once('$')?;
    if rest.len() != 53 || !rest.bytes().all(letter) || cost.len() != 2 {
        return None;
    }
    // What bcrypt itself does not take would never be right.
    bcrypt::verify("", &format!("$2b$04${rest}")).ok()?;
    cost.parse().ok()
}

impl Users {
    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there or not a good list.
    pub fn open(path: PathBuf) -> Result<Self, String> {
        let shown = path.display().to_string();
        let last = Mutex::new(HashMap::new());
        let load = move |files: &[Vec<u8>]| {
            let table = parse(&files[0]).map_err(|why| format!("{shown}: {why}"))?;
            let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
            table.users.values().for_each(|user| user.remember_as(last.get(&user.name)));
            last.clone_from(&table.users);
            Ok(table)
        };
        // Half of the cores go on with the rest, however many passwords come.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let computing = Arc::new(Semaphore::new((cores / 2).max(1)));
        Ok(Self { file: Followed::new(vec![path], load)?, computing })
    }

    /// Follows the file; `failed` hears of each that is not good, which leaves the old one in force.
    pub async fn follow(&self, failed: impl FnMut(&str)) {
        self.file.follow(failed).await;
    }

    /// The user who shows these credentials.
    ///
    /// # Errors
    /// `auth`, or `too-many` when too many passwords are being tried for that user.
    pub async fn authenticate(&self, shown: Option<&Credentials>) -> Result<Arc<User>, Refusal> {
        let shown = shown.filter(|shown| shown.password.len() <= PASSWORD_LIMIT).ok_or(Reason::Auth)?;
        let table = self.file.get();
        let user = table.users.get(&*shown.name);
        let right = user.unwrap_or(&table.nobody).is(&shown.password, &self.computing).await?;
        user.filter(|_| right).cloned().ok_or_else(|| Reason::Auth.into())
    }
}

impl User {
    fn new(name: &str, hash: &str, ports: Vec<u16>) -> Self {
        Self {
            name: name.into(),
            hash: hash.into(),
            ports: ports.into(),
            remembered: OnceLock::new(),
            turn: Arc::new(Semaphore::new(1)),
            trying: Mutex::default(),
        }
    }

    /// Takes over what is known of a user of an earlier file with the same hash.
    fn remember_as(&self, former: Option<&Arc<Self>>) {
        let right =
            former.filter(|former| former.hash == self.hash).and_then(|former| former.remembered.get());
        if let Some(right) = right {
            let _ = self.remembered.set(right.clone());
        }
    }

    /// Whether this port may be asked for.
    ///
    /// # Errors
    /// `forbidden-port`.
    pub fn may_reach(&self, port: u16) -> Result<(), Refusal> {
        if self.ports.contains(&port) {
            return Ok(());
        }
        let why =
            format_args!("user {} may not reach port {port}; see its \"ports\" in --proxy-users", self.name);
        Err(Refusal::new(Reason::ForbiddenPort, why))
    }

    /// Whether this is the user's password.
    async fn is(self: &Arc<Self>, password: &[u8], computing: &Arc<Semaphore>) -> Result<bool, Refusal> {
        if self.remembered.get().is_some_and(|right| right.ct_eq(password).into()) {
            return Ok(true);
        }
        let attempt = Attempt::join(self, password)?;
        Ok(*attempt.outcome().get_or_init(|| self.compute(password, computing)).await)
    }

    /// Computes a bcrypt, in turn. Once begun it is finished, also when nobody waits for it any more.
    async fn compute(self: &Arc<Self>, password: &[u8], computing: &Arc<Semaphore>) -> bool {
        // Nobody closes them.
        let turn = self.turn.clone().acquire_owned().await;
        let place = computing.clone().acquire_owned().await;
        let (user, password): (_, Box<[u8]>) = (self.clone(), password.into());
        let computed = tokio::task::spawn_blocking(move || {
            let right = bcrypt::verify(&password, &user.hash).unwrap_or(false);
            if right {
                let _ = user.remembered.set(password);
            }
            drop((turn, place));
            right
        });
        computed.await.unwrap_or(false)
    }

    fn trying(&self) -> MutexGuard<'_, Trying> {
        self.trying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A password that is being tried; whoever sends the same meanwhile shares the outcome.
struct Attempt<'a> {
    user: &'a User,
    password: &'a [u8],
    outcome: Option<Arc<OnceCell<bool>>>,
}

impl<'a> Attempt<'a> {
    fn join(user: &'a User, password: &'a [u8]) -> Result<Self, Refusal> {
        let mut trying = user.trying();
        let outcome = match trying.get(password) {
            Some(outcome) => outcome.clone(),
            None if trying.len() >= WAITING => {
                let why = "too many passwords are being tried for this user; try again";
                return Err(Refusal::new(Reason::TooMany, why));
            }
            None => trying.entry(password.into()).or_default().clone(),
        };
        Ok(Self { user, password, outcome: Some(outcome) })
    }

    fn outcome(&self) -> Arc<OnceCell<bool>> {
        self.outcome.clone().unwrap_or_default()
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut trying = self.user.trying();
        self.outcome = None;
        // The last one out.
        if trying.get(self.password).is_some_and(|outcome| Arc::strong_count(outcome) == 1) {
            trying.remove(self.password);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use std::{fs, time::Duration};

    /// "right", as `htpasswd -nbB -C 4` would write it.
    fn hash(password: &str) -> String {
        bcrypt::hash(password, 4).unwrap().replace("$2b$", "$2y$")
    }

    fn file(dir: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = dir.path().join("users.json");
        fs::write(&path, text).unwrap();
        path
    }

    fn shown(name: &str, password: &str) -> Credentials {
        Credentials { name: name.into(), password: password.as_bytes().into() }
    }

    #[test]
    fn what_is_no_list() {
        let good = hash("x");
        for (text, says) in [
            (String::new(), "empty"),
            ("{}".into(), "map"),
            (r#"[{"name": "a"}]"#.into(), "hash"),
            (r#"[{"name": "a", "hash": "secret"}]"#.into(), "bcrypt"),
            (r#"[{"name": "a", "hash": "$apr1$x$y"}]"#.into(), "bcrypt"),
            (format!(r#"[{{"name": "a", "hash": "{}"}}]"#, good.replace("$04$", "$31$")), "2^31"),
            (format!(r#"[{{"name": "a", "hash": "{}"}}]"#, &good[..59]), "bcrypt"),
            (format!(r#"[{{"name": "a:b", "hash": "{good}"}}]"#), "no colon"),
            (format!(r#"[{{"name": "", "hash": "{good}"}}]"#), "name"),
            (format!(r#"[{{"name": "a", "hash": "{good}", "ports": [0]}}]"#), "no port"),
            (format!(r#"[{{"name": "a", "hash": "{good}", "ports": [70000]}}]"#), "70000"),
            (format!(r#"[{{"name": "a", "hash": "{good}", "port": [1]}}]"#), "port"),
            (format!(r#"["a:{good}"]"#), "line 1"),
            (format!(r#"[{{"name": "a", "hash": "{good}", "ports": "secret"}}]"#), "line 1"),
            (format!(r#"[{{"name": "a", "hash": "{good}"}}, {{"name": "a", "hash": "{good}"}}]"#), "twice"),
        ] {
            let why = parse(text.as_bytes()).unwrap_err();
            assert!(
                why.contains(says) && !why.contains("secret") && !why.contains(&good[8..20]),
                "{text}: {why}"
            );
        }
        let empty = parse(b"[]").unwrap();
        assert!(
            empty.users.is_empty() && cost(&empty.nobody.hash) == Some(4),
            "nobody's is computed like anybody's"
        );
    }

    #[tokio::test]
    async fn names_passwords_and_ports() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(
            &dir,
            &format!(
                r#"[{{"name": "prometheus", "hash": "{}", "ports": [10250, 9100]}}, {{"name": "none", "hash": "{}"}}]"#,
                hash("right"),
                hash("right")
            ),
        );
        let users = Users::open(path).unwrap();
        for _ in 0..2 {
            let user = users.authenticate(Some(&shown("prometheus", "right"))).await.unwrap();
            assert!(user.may_reach(9100).is_ok());
            let refusal = user.may_reach(22).unwrap_err();
            assert_eq!(refusal.reason, Reason::ForbiddenPort);
            assert!(!format!("{user:?}").contains("$2"), "{user:?}");
        }
        let none = users.authenticate(Some(&shown("none", "right"))).await.unwrap();
        assert!(none.may_reach(10250).is_err(), "no ports are none");
        for wrong in [
            None,
            Some(shown("prometheus", "wrong")),
            Some(shown("prometheus", "")),
            Some(shown("nobody", "right")),
            Some(shown("-", "right")),
            Some(shown("prometheus", &"x".repeat(5000))),
        ] {
            assert_eq!(
                users.authenticate(wrong.as_ref()).await.unwrap_err().reason,
                Reason::Auth,
                "{wrong:?}"
            );
        }
    }

    /// A thousand scrapes begin at once: one bcrypt. A thousand guesses at once: a few wait, the rest hear so.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_same_password_is_computed_once_and_guesses_do_not_pile_up() {
        let dir = tempfile::tempdir().unwrap();
        let users = [("a", "right"), ("b", "right")].map(|(name, password)| {
            format!(r#"{{"name": "{name}", "hash": "{}", "ports": [1]}}"#, hash(password))
        });
        let users = Arc::new(Users::open(file(&dir, &format!("[{}]", users.join(",")))).unwrap());
        let right = (0..1000).map(|_| {
            let users = users.clone();
            async move { users.authenticate(Some(&shown("a", "right"))).await.is_ok() }
        });
        assert!(join_all(right).await.into_iter().all(|right| right));

        let guesses = (0..1000).map(|number| {
            let users = users.clone();
            async move {
                users.authenticate(Some(&shown("a", &format!("guess{number}")))).await.unwrap_err().reason
            }
        });
        let guesses = tokio::spawn(join_all(guesses));
        // Somebody else's first is not held up by all of them.
        let shown_by_b = shown("b", "right");
        let other = users.authenticate(Some(&shown_by_b));
        tokio::time::timeout(Duration::from_secs(5), other).await.unwrap().unwrap();
        users.authenticate(Some(&shown("a", "right"))).await.unwrap();
        let reasons = guesses.await.unwrap();
        let busy = reasons.iter().filter(|reason| **reason == Reason::TooMany).count();
        assert!((1000 - 2 * WAITING..1000).contains(&busy), "{busy}");
        assert!(reasons.iter().all(|reason| [Reason::TooMany, Reason::Auth].contains(reason)));
        let table = users.file.get();
        assert!(table.users.values().all(|user| user.trying().is_empty()), "nothing is left behind");
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_hash_is_asked_for_anew_and_a_broken_file_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let line =
            |password: &str| format!(r#"[{{"name": "a", "hash": "{}", "ports": [1]}}]"#, hash(password));
        let path = file(&dir, &line("old"));
        let users = Arc::new(Users::open(path.clone()).unwrap());
        let failures = Arc::new(Mutex::new(Vec::new()));
        let follow = tokio::spawn({
            let (users, failures) = (users.clone(), failures.clone());
            async move { users.follow(|why| failures.lock().unwrap().push(why.to_owned())).await }
        });
        let may = async |password: &str| users.authenticate(Some(&shown("a", password))).await.is_ok();
        assert!(may("old").await);
        for (text, old, failed) in
            [("[{", true, 1), ("", true, 2), (&*line("new"), false, 2), ("[]", false, 2)]
        {
            fs::write(&path, text).unwrap();
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert_eq!(may("old").await, old, "{text}");
            assert_eq!(may("new").await, text.contains("hash"), "{text}");
            assert_eq!(failures.lock().unwrap().len(), failed, "{text}");
        }
        assert!(failures.lock().unwrap().iter().all(|why| why.contains("users.json")));
        follow.abort();
    }
}
