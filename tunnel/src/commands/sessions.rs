//! `edge-tunnel sessions`: who is connected, since when, with how many streams and bytes, and how far away.
//!
//! Asks the /sessions page of each replica that is named; each shows its own sessions.

use crate::{audit::Escaped, http::Sessions, target::Target};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use jiff::Timestamp;
use std::{fmt::Write, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// From dialling to the last byte of a page.
const PATIENCE: Duration = Duration::from_secs(10);

/// The largest page, bytes: 10,000 sessions have two million.
const PAGE_LIMIT: u64 = 64 << 20;

/// The flags as written.
#[derive(Debug, Args)]
pub struct SessionsArgs {
    /// A server's --metrics-listen; repeat it for several replicas
    #[arg(
        long,
        env = "EDGE_TUNNEL_URL",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:10267"
    )]
    url: Vec<String>,
    /// A table for people, or JSON as the page has it, a line for each URL
    #[arg(long, short, env = "EDGE_TUNNEL_OUTPUT", value_name = "FORMAT", default_value = "table")]
    output: Output,
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// Asks, and gives what to print.
///
/// # Errors
/// The first server that did not answer, and why.
pub async fn run(args: &SessionsArgs) -> Result<String> {
    let mut pages = Vec::new();
    for url in &args.url {
        let asked = async {
            fetch(url).await.with_context(|| format!("{url}: is that a server's --metrics-listen?"))
        };
        pages.push(asked.await?);
    }
    match args.output {
        Output::Table => Ok(table(&pages, Timestamp::now())),
        Output::Json => {
            let lines = pages.iter().map(|page| Ok(serde_json::to_string(page)? + "\n"));
            lines.collect()
        }
    }
}

async fn fetch(url: &str) -> Result<Sessions> {
    let address = url.strip_prefix("http://").context("write http://HOST:PORT")?.trim_end_matches('/');
    let target: Target = address.parse().map_err(|why| anyhow::anyhow!("{why}"))?;
    let answer = timeout(PATIENCE, get(&target)).await;
    page(&answer.with_context(|| format!("no answer within {} s", PATIENCE.as_secs()))??)
}

async fn get(target: &Target) -> Result<Vec<u8>> {
    let mut socket = TcpStream::connect(target.to_string()).await.context("cannot connect")?;
    let request = format!("GET /sessions HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    socket.take(PAGE_LIMIT).read_to_end(&mut answer).await?;
    Ok(answer)
}

/// What an answer says.
fn page(answer: &[u8]) -> Result<Sessions> {
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut response = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(length)) = response.parse(answer) else {
        bail!("what answers is no HTTP")
    };
    let body = &answer[length..];
    match response.code {
        Some(200) => serde_json::from_slice(body).context("the answer is no list of sessions"),
        code => bail!("{}: {}", code.unwrap_or_default(), Escaped::new(body.trim_ascii())),
    }
}

/// The table, sorted by node.
fn table(pages: &[Sessions], now: Timestamp) -> String {
    let head = ["NODE", "REMOTE", "SINCE", "STREAMS", "IN", "OUT", "RTT", "REPLICA"].map(str::to_owned);
    let mut rows = Vec::new();
    for page in pages {
        for session in &page.sessions {
            let since = session.since.parse::<Timestamp>();
            rows.push([
                session.node.clone(),
                session.remote.clone(),
                since
                    .map_or_else(|_| session.since.clone(), |since| age(now.as_second() - since.as_second())),
                session.streams.to_string(),
                bytes(session.bytes_in),
                bytes(session.bytes_out),
                session.rtt_ms.map_or_else(|| "-".into(), |time| format!("{time:.1} ms")),
                page.replica.clone(),
            ]);
        }
    }
    rows.sort();
    rows.insert(0, head);
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..8).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let line: Vec<String> = cells.collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{}", line.join("  ").trim_end());
    }
    text
}

/// An age as kubectl shows it.
fn age(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{}s", seconds.max(0)),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut size = count as f64;
    let mut unit = "B";
    for next in UNITS {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, next);
    }
    if unit == "B" { format!("{count} B") } else { format!("{size:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_for_people() {
        let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n\
            {\"replica\":\"a1\",\"sessions\":[\
            {\"node\":\"node2\",\"remote\":\"10.0.0.5:4711\",\"since\":\"2026-11-24T14:00:00Z\",\"streams\":2,\
             \"bytes_in\":1023,\"bytes_out\":1572864,\"rtt_ms\":1.54},\
            {\"node\":\"node1\",\"remote\":\"[fd00::5]:1\",\"since\":\"x\",\"streams\":0,\"bytes_in\":0,\"bytes_out\":0,\
             \"rtt_ms\":null}]}";
        let shown = table(&[page(answer.as_bytes()).unwrap()], "2026-11-24T16:30:00Z".parse().unwrap());
        assert_eq!(
            shown,
            "NODE   REMOTE         SINCE  STREAMS  IN      OUT      RTT     REPLICA\n\
             node1  [fd00::5]:1    x      0        0 B     0 B      -       a1\n\
             node2  10.0.0.5:4711  2h     2        1023 B  1.5 MiB  1.5 ms  a1\n"
        );
        assert_eq!(table(&[], Timestamp::now()).lines().count(), 1);
        for (seconds, shown) in [(-5, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (200_000, "2d")] {
            assert_eq!(age(seconds), shown);
        }
    }

    #[test]
    fn answers_that_are_no_sessions() {
        for (answer, says) in [
            ("SSH-2.0-x\r\n", "no HTTP"),
            ("HTTP/1.1 404 Not Found\r\n\r\nan agent has no such page\n", "404: an agent"),
            ("HTTP/1.1 200 OK\r\n\r\n[]", "no list"),
        ] {
            let why = page(answer.as_bytes()).unwrap_err().to_string();
            assert!(why.contains(says), "{why}");
        }
    }
}
