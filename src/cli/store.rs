//! `tollgate store`: what has to be in a database before a gateway can use it, and whether a store keeps its promise.

use super::Failure;
use super::configuration::ConfigOption;
use super::progress::Progress;
use crate::clock;
use crate::store::postgres::{self, NoTriggers, PostgresAdmin, PostgresSettings};
use crate::store::{Finding, FindingSeverity, NamedStore, StoreSettings};
use crate::telemetry::metrics::Metrics;
use anyhow::anyhow;
use clap::Subcommand;
use std::sync::Arc;

#[derive(clap::Args)]
pub(super) struct StoreOptions {
    #[command(flatten)]
    config: ConfigOption,
    /// Name of the [[store]] (default: the only one of kind "postgres")
    #[arg(long, value_name = "NAME")]
    store: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Which triggers, and whether only their SQL is wanted.
#[derive(clap::Args)]
pub(super) struct TriggerOptions {
    #[command(flatten)]
    options: StoreOptions,
    /// Print the SQL instead of running it
    #[arg(long)]
    print: bool,
    /// For preset = "custom": the table with the tokens, like `people` or `auth.tokens`
    #[arg(long, requires = "column")]
    table: Option<String>,
    /// The column of that table that `lookup` compares with $1
    #[arg(long, requires = "table")]
    column: Option<String>,
}

#[derive(Subcommand)]
pub(super) enum StoreCommand {
    /// Create or migrate tollgate's own tables in PostgreSQL.
    Migrate {
        #[command(flatten)]
        options: StoreOptions,
        /// Print the SQL that would run now instead of running it
        #[arg(long)]
        print: bool,
    },
    /// Look whether a store keeps its promise: connection, rights, triggers, notifications, the server's settings and clock.
    ///
    /// Run it as the user, and with the configuration, of the gateway. Changes no token, and makes no database. Exit codes: 0
    /// nothing is wrong (there may be warnings), 1 something is.
    Check {
        #[command(flatten)]
        config: ConfigOption,
        /// Name of the [[store]] (default: all)
        #[arg(long, value_name = "NAME")]
        store: Option<String>,
        /// Print one JSON object for each finding, and nothing else
        #[arg(long)]
        json: bool,
    },
    /// Create the triggers for change notifications in GitLab's tables, or in another one with --table and --column.
    InstallTriggers {
        #[command(flatten)]
        triggers: TriggerOptions,
    },
    /// Remove the triggers that install-triggers makes with the same configuration and arguments. A revoked token then works
    /// for up to positive_ttl.
    UninstallTriggers {
        #[command(flatten)]
        triggers: TriggerOptions,
    },
}

pub(super) async fn run(command: StoreCommand) -> Result<(), Failure> {
    match command {
        StoreCommand::Check { config, store, json } => check(&config, store.as_deref(), json).await?,
        StoreCommand::Migrate { options, print: true } => {
            let (_, settings) = postgres_store(&options)?;
            let sql = PostgresAdmin::migration_sql(&settings).await?;
            say!("{}", if sql.is_empty() { "-- there is nothing to do" } else { sql.trim_end() })?;
        }
        StoreCommand::Migrate { options, print: false } => {
            let (name, settings) = postgres_store(&options)?;
            let progress = Progress::new("migrating");
            let migrated = PostgresAdmin::migrate(&settings).await;
            drop(progress);
            let migrated = migrated?;
            if options.json {
                let moved = migrated.moved.map(|(was, now)| serde_json::json!({ "before": was, "now": now }));
                say!(
                    "{}",
                    serde_json::json!({ "store": name, "schema_version": migrated.version, "channel_changed": moved })
                )?;
                return Ok(());
            }
            say!("store {name}: the schema has version {}", migrated.version)?;
            if let Some((was, now)) = migrated.moved {
                say!(
                    "store {name}: THE CHANNEL CHANGED for every gateway of this schema: \"{was}\" before, \"{now}\" now. \
                     Gateways that run follow by themselves. Write channel = \"{now}\" into every configuration of \
                     this store"
                )?;
            }
        }
        StoreCommand::InstallTriggers { triggers } => {
            let json = triggers.options.json;
            if let Some((name, settings)) = run_triggers(triggers, postgres::triggers_sql).await? {
                let channel = settings.channel.as_deref().unwrap_or_default();
                if json {
                    say!("{}", serde_json::json!({ "store": name, "triggers": true, "channel": channel }))?;
                    return Ok(());
                }
                say!("store {name}: the triggers are there, and tell of changes on channel \"{channel}\"")?;
            }
        }
        StoreCommand::UninstallTriggers { triggers } => {
            let json = triggers.options.json;
            if let Some((name, _)) = run_triggers(triggers, postgres::removal_sql).await? {
                if json {
                    say!("{}", serde_json::json!({ "store": name, "triggers": false, "channel": null }))?;
                    return Ok(());
                }
                say!("store {name}: the triggers are gone; revoked tokens work for up to positive_ttl")?;
            }
        }
    }
    Ok(())
}

type TriggersSql = fn(&PostgresSettings, Option<&(String, String)>) -> Result<String, NoTriggers>;

/// Runs the SQL, and returns the store; or prints it.
async fn run_triggers(
    triggers: TriggerOptions,
    sql_of: TriggersSql,
) -> Result<Option<(String, PostgresSettings)>, Failure> {
    let TriggerOptions { options, print, table, column } = triggers;
    let (name, settings) = postgres_store(&options)?;
    let sql = sql_of(&settings, table.zip(column).as_ref()).map_err(|why| anyhow!("store {name}: {why}"))?;
    if print {
        say!("{}", sql.trim_end())?;
        return Ok(None);
    }
    let progress = Progress::new("changing the triggers");
    let done = postgres::run_triggers_sql(&settings, &sql).await;
    drop(progress);
    done?;
    Ok(Some((name, settings)))
}

/// Prints every finding, the good ones as well, and what mends the others.
async fn check(config: &ConfigOption, name: Option<&str>, json: bool) -> Result<(), Failure> {
    let settings = super::load(config)?;
    let stores: Vec<_> = settings.stores.iter().filter(|store| name.is_none_or(|name| name == store.name)).collect();
    if stores.is_empty() {
        let names = settings.stores.iter().map(|store| store.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(anyhow!("there is no store \"{}\"; configured stores: {names}", name.unwrap_or_default()).into());
    }
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION"))?;
    let (mut errors, mut warnings) = (0, 0);
    for store in stores {
        let progress = Progress::new("examining the store");
        let found = store.examine(Arc::new(metrics.store(&store.name)), clock::now).await;
        drop(progress);
        let name = super::hidden(&store.name);
        for Finding { severity, what, mend } in found {
            let (what, mend) = (super::hidden(&what), super::hidden(&mend));
            let how = match severity {
                FindingSeverity::Fine => "ok",
                FindingSeverity::Warning => "warning",
                FindingSeverity::Error => "error",
            };
            warnings += usize::from(severity == FindingSeverity::Warning);
            errors += usize::from(severity == FindingSeverity::Error);
            if json {
                say!("{}", serde_json::json!({ "store": name, "severity": how, "message": what, "instead": mend }))?;
                continue;
            }
            say!("{how}: store {name}: {what}{}{mend}", if mend.is_empty() { "" } else { ". To mend it: " })?;
        }
    }
    if !json {
        say!("{errors} errors, {warnings} warnings")?;
    }
    if errors > 0 {
        Err(Failure::Failed(anyhow!("the store does not keep its promise: see the errors above")))
    } else {
        Ok(())
    }
}

fn postgres_store(options: &StoreOptions) -> Result<(String, PostgresSettings), Failure> {
    let settings = super::load(&options.config)?;
    let wanted = |store: &&NamedStore| options.store.as_ref().is_none_or(|name| *name == store.name);
    let found: Vec<_> = settings
        .stores
        .iter()
        .filter(wanted)
        .filter_map(|store| match &store.kind {
            StoreSettings::Postgres(settings) => Some((store.name.clone(), (**settings).clone())),
            _ => None,
        })
        .collect();
    Ok(match <[_; 1]>::try_from(found) {
        Ok([store]) => store,
        Err(none) if none.is_empty() => {
            return Err(anyhow!("there is no such [[store]] of kind \"postgres\"; the other kinds need nothing").into());
        }
        Err(_) => return Err(anyhow!("there are several: name one with --store").into()),
    })
}
