//! One call as the spec defines it (section 2): environment and stdin, checked, as a value.
//!
//! Everything is checked in the order of the Go reference, so that a caller with two mistakes is told the
//! same one by every plugin: variables, stdin, configuration, ids, version, verb.

use crate::{Args, ContainerId, Error, IfName, NetConf, SearchPath, Version, golike};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    env, fs,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// More than any runtime sends; what is longer is a mistake (or /dev/zero).
const STDIN_LIMIT: u64 = 64 << 20;

/// What every verb but VERSION comes with.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The network configuration.
    pub conf: NetConf,
    /// `CNI_PATH`: where delegates are.
    pub path: SearchPath,
}

/// The key of an attachment: the same container may have several interfaces on one network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId {
    /// `CNI_CONTAINERID`
    pub container_id: ContainerId,
    /// `CNI_IFNAME`
    pub ifname: IfName,
}

/// The attachment that a call is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Container and interface.
    pub id: AttachmentId,
    /// `CNI_ARGS`
    pub args: Args,
}

/// A call, checked.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// VERSION, to be answered in this version.
    Version(Version),
    /// ADD
    Add {
        /// Configuration and path.
        call: Call,
        /// What to make.
        at: Attachment,
        /// `CNI_NETNS`
        netns: PathBuf,
    },
    /// DEL
    Del {
        /// Configuration and path.
        call: Call,
        /// What to take away.
        at: Attachment,
        /// `CNI_NETNS`, unless empty.
        netns: Option<PathBuf>,
    },
    /// CHECK; `call.conf.prev_result` is there.
    Check {
        /// Configuration and path.
        call: Call,
        /// What to look at.
        at: Attachment,
        /// `CNI_NETNS`
        netns: PathBuf,
    },
    /// GC
    Gc {
        /// Configuration and path.
        call: Call,
        /// `cni.dev/valid-attachments`; `None` when the key is absent.
        valid: Option<Vec<AttachmentId>>,
    },
    /// STATUS
    Status {
        /// Configuration and path.
        call: Call,
    },
}

impl Request {
    /// Reads and checks a call. `version` becomes the configuration's as soon as that is known.
    ///
    /// # Errors
    /// 4 variables, 5 stdin unreadable, 6 and 7 configuration, 1 version. Nothing has been done then.
    pub fn read(
        environment: &Environment,
        stdin: &mut dyn Read,
        version: &mut Version,
    ) -> Result<Self, Error> {
        let command = environment.command().unwrap_or_default();
        if command == "VERSION" {
            return Ok(Self::Version(asked_version(stdin)));
        }
        let verb = Verb::parse(command)?;
        environment.require(verb)?;
        let mut conf = NetConf::parse(read_all(stdin)?, version)?;
        let path = SearchPath::new(environment);
        if let Some(since) = verb.since()
            && conf.version < since
        {
            return Err(Error::incompatible_version(format!(
                "{command} exists since cniVersion {since}, and the configuration says {}",
                conf.version
            )));
        }
        let attachment = || -> Result<Attachment, Error> {
            Ok(Attachment {
                id: AttachmentId {
                    container_id: ContainerId::parse(environment.get("CNI_CONTAINERID"))?,
                    ifname: IfName::parse(environment.get("CNI_IFNAME"))?,
                },
                args: Args::parse(environment.get("CNI_ARGS"))?,
            })
        };
        let netns = PathBuf::from(environment.get("CNI_NETNS"));
        match verb {
            Verb::Add => {
                let at = attachment()?;
                conf.prev_result = conf.read_prev_result()?;
                Ok(Self::Add { call: Call { conf, path }, at, netns })
            }
            Verb::Check => {
                let at = attachment()?;
                conf.prev_result = conf.read_prev_result()?;
                if conf.prev_result.is_none() {
                    return Err(Error::invalid_config("CHECK needs prevResult, and there is none"));
                }
                Ok(Self::Check { call: Call { conf, path }, at, netns })
            }
            Verb::Del => {
                let at = attachment()?;
                // A torn result cache must not keep a pod from being deleted (containerd#8197).
                conf.prev_result = conf.read_prev_result().unwrap_or_else(|error| {
                    log::warn!("DEL goes on without the previous result: {error}");
                    None
                });
                let netns = Some(netns).filter(|path| !path.as_os_str().is_empty());
                Ok(Self::Del { call: Call { conf, path }, at, netns })
            }
            Verb::Gc => {
                let valid = valid_attachments(&conf)?;
                Ok(Self::Gc { call: Call { conf, path }, valid })
            }
            Verb::Status => Ok(Self::Status { call: Call { conf, path } }),
        }
    }
}

/// The verbs that come with a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
}

impl Verb {
    fn parse(command: &str) -> Result<Self, Error> {
        Ok(match command {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            _ => {
                return Err(Error::invalid_environment(format!(
                    "CNI_COMMAND is {command:?}: not one of ADD, DEL, CHECK, GC, STATUS, VERSION"
                )));
            }
        })
    }

    /// The variables that must be there (the table of the reference's skel package).
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"],
            Self::Gc | Self::Status => &["CNI_PATH"],
        }
    }

    /// The first version of the spec that has the verb, where it is not the first of all.
    fn since(self) -> Option<Version> {
        match self {
            Self::Add | Self::Del => None,
            Self::Check => Some(Version::V0_4_0),
            Self::Gc | Self::Status => Some(Version::V1_1_0),
        }
    }
}

/// The `CNI_*` variables of a call. An empty one counts as missing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Takes the variables of this process.
    ///
    /// # Errors
    /// Code 4 when one is not UTF-8.
    pub fn from_process() -> Result<Self, Error> {
        let ours = |name: &std::ffi::OsString| name.as_encoded_bytes().starts_with(b"CNI_");
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| match (
            name.into_string(),
            value.into_string(),
        ) {
            (Ok(name), Ok(value)) => Ok((name, value)),
            (Ok(name), Err(_)) => Err(Error::invalid_environment(format!("{name} is not UTF-8"))),
            _ => Err(Error::invalid_environment("a CNI_ variable's name is not UTF-8")),
        };
        env::vars_os().filter(|(name, _)| ours(name)).map(text).collect::<Result<_, _>>().map(Self)
    }

    /// The value of a variable, or "".
    #[must_use]
    pub fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// `CNI_COMMAND`, when a runtime called; a person has none.
    #[must_use]
    pub fn command(&self) -> Option<&str> {
        Some(self.get("CNI_COMMAND")).filter(|command| !command.is_empty())
    }

    /// All variables, for a delegate.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn require(&self, verb: Verb) -> Result<(), Error> {
        let missing: Vec<&str> =
            verb.required().iter().copied().filter(|name| self.get(name).is_empty()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::invalid_environment(format!("required env variables [{}] missing", missing.join(","))))
    }

    /// Refuses `CNI_NETNS` when it is this process's own: a runtime after a reboot may pass a recycled
    /// `/proc/PID/ns/net` (cri-o#2849), and the host's devices would be taken for the container's. A path that cannot
    /// be opened counts as another one. `CNI_NETNS_OVERRIDE=1` switches the check off.
    pub(crate) fn refuse_own_netns(&self, netns: &Path) -> Result<(), Error> {
        let permitted = matches!(self.get("CNI_NETNS_OVERRIDE").to_ascii_lowercase().as_str(), "1" | "true");
        let inode = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
        let same = match (inode(netns), inode(Path::new("/proc/thread-self/ns/net"))) {
            (Ok(theirs), Ok(ours)) => theirs == ours,
            _ => false,
        };
        if same && !permitted {
            return Err(Error::invalid_netns(format!(
                "CNI_NETNS {} is the plugin's own network namespace; set CNI_NETNS_OVERRIDE=1 if that is meant",
                netns.display()
            )));
        }
        Ok(())
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

fn read_all(stdin: &mut dyn Read) -> Result<Vec<u8>, Error> {
    let mut raw = Vec::new();
    stdin
        .take(STDIN_LIMIT + 1)
        .read_to_end(&mut raw)
        .map_err(|e| Error::io(format!("read the network configuration from stdin: {e}")))?;
    if raw.len() as u64 > STDIN_LIMIT {
        let limit = STDIN_LIMIT >> 20;
        return Err(Error::io(format!("the network configuration on stdin is over {limit} MiB")));
    }
    Ok(raw)
}

/// VERSION is answered in the version asked for, or in the newest. A malformed question is answered too:
/// the caller wants to find out what can be spoken here.
fn asked_version(stdin: &mut dyn Read) -> Version {
    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "camelCase")]
    struct Asked {
        cni_version: String,
    }
    let asked = read_all(stdin).ok().and_then(|raw| serde_json::from_slice(&raw).ok());
    let asked: Asked = asked.and_then(|asked| golike::from_value(&asked).ok()).unwrap_or_default();
    if asked.cni_version.is_empty() {
        return Version::LATEST;
    }
    Version::parse(&asked.cni_version).unwrap_or(Version::LATEST)
}

fn valid_attachments(conf: &NetConf) -> Result<Option<Vec<AttachmentId>>, Error> {
    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "camelCase")]
    struct Written {
        #[serde(rename = "containerID")]
        container_id: String,
        ifname: String,
    }
    const KEY: &str = "cni.dev/valid-attachments";
    // libcni also sends the name of a draft of the spec (cni#1103).
    let Some(list) = conf.get(KEY).or_else(|| conf.get("cni.dev/attachments")) else {
        return Ok(None);
    };
    let list: Vec<Written> = golike::from_value(list).map_err(|e| Error::decode(format!("{KEY}: {e}")))?;
    let checked = |written: &Written| -> Result<AttachmentId, Error> {
        Ok(AttachmentId {
            container_id: ContainerId::parse(&written.container_id)?,
            ifname: IfName::parse(&written.ifname)?,
        })
    };
    // One bad entry makes the list untrustworthy, and what it lists is about to be freed: do nothing.
    let checked: Result<Vec<_>, _> = list.iter().map(checked).collect();
    checked.map(Some).map_err(|error| Error::invalid_config(format!("{KEY}: {}", error.msg)))
}
