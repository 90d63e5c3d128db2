//! `edge-tunnel`: reads the command line and runs what it names.

use anyhow::{Result, ensure};
use clap::Parser;
use std::{io::Write, process::ExitCode};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};
use tunnel::{
    agent::Agent,
    commands::{certs, doctor, sessions},
    config::{
        Cli, Command, LogFormat,
        agent::AgentArgs,
        server::{ServerArgs, in_pod},
    },
    logging,
    server::Server,
};

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Server(args) => serve(&args),
        Command::Agent(args) => be_an_agent(&args),
        Command::Doctor(args) => diagnose(&args),
        Command::Sessions(args) => runtime(Builder::new_current_thread())
            .and_then(|runtime| runtime.block_on(sessions::run(&args)))
            .and_then(|text| print(&text)),
        Command::Certs(args) => certs::run(&args).and_then(|text| print(&text)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A mistake in the flags comes before the log could be started as they ask for.
            logging::start(LogFormat::Text);
            for line in format!("{error:#}").lines() {
                log::error!("{line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ServerArgs) -> Result<()> {
    let config = args.check(in_pod())?;
    logging::start(config.log_format);
    runtime(Builder::new_multi_thread())?.block_on(async {
        let server = Server::bind(config)?;
        log::info!("agents dial {}", server.agents_address()?);
        Ok(server.run(told_to_stop()?).await?)
    })
}

fn be_an_agent(args: &AgentArgs) -> Result<()> {
    let config = args.check(|name| std::env::var(name).ok())?;
    logging::start(config.log_format);
    runtime(Builder::new_current_thread())?.block_on(async {
        let agent = Agent::new(config).map_err(anyhow::Error::msg)?;
        agent.run(told_to_stop()?).await;
        Ok(())
    })
}

fn diagnose(args: &AgentArgs) -> Result<()> {
    let config = args.check(|name| std::env::var(name).ok())?;
    let going = doctor::run(&config);
    let (text, all) = runtime(Builder::new_current_thread())?.block_on(going).map_err(anyhow::Error::msg)?;
    print(&text)?;
    ensure!(all, "not every step was passed");
    Ok(())
}

/// Writes what a person asked for.
fn print(text: &str) -> Result<()> {
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn runtime(mut builder: Builder) -> Result<Runtime> {
    Ok(builder.enable_all().build()?)
}

/// Ready at SIGTERM or SIGINT. The next one ends the process at once: whoever sends it does not want to wait for `--drain`.
fn told_to_stop() -> Result<impl Future<Output = ()>> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let mut told = async move || {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    Ok(async move {
        told().await;
        tokio::spawn(async move {
            told().await;
            log::warn!("told to stop once more: the streams that are left are cut");
            std::process::exit(1);
        });
    })
}
