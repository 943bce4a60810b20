//! Writing tokens to Redis. One change is one script, which checks that the record has not changed meanwhile, writes
//! it, and then publishes the notification, never before the value. In a cluster a script reaches one slot only, so a
//! change of two tokens takes two steps there, in an order that loses nothing.

use super::super::{
    AdminError, Confirmations, Differing, Imported, REPLICA_GONE, Records, TokenAdmin, TokenRecord, Visitor,
};
use super::follow::WAIT_KEPT;
use super::link::{Connector, RedisConnection, failed};
use super::record::{Stored, edited, to_json};
use super::{Found, Keys, RedisChanges, RedisSettings, Topology, is_open, is_wrong_type, questions, read, stored};
use crate::store::credential::Digest;
use crate::store::query::{TokenQuery, TokenRank};
use crate::store::record::RecordField;
use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use redis::{RedisError, Value};
use serde_json::{Value as Json, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ANSWER: Duration = Duration::from_secs(10);
/// How often a change is retried after a concurrent change.
const ATTEMPTS: usize = 10;
/// Records in one round trip. More would show in the memory of a list.
const BATCH: usize = 1_000;
/// Keys that one SCAN looks at for the records of one user, of which few are kept. It keeps the server from everything else
/// for about a millisecond.
const SCANNED: usize = 4_000;
/// With more new tokens than this, one notification for all tokens is sent instead of one for each.
const NAMED: usize = 10_000;
/// Keys that one script removes: it keeps the server from everything else meanwhile.
const REMOVED_AT_ONCE: usize = 200;
const FOUND_MOST: usize = 100;
const WAIT_REPEAT: Duration = Duration::from_secs(1);

/// Atomic. `ARGV[1]` is the channel, or empty; then for each key its expected and its new value, as JSON. A string is
/// compared as a whole, a hash by the fields that are set. KEEPTTL preserves the TTL of a key.
const CHANGE: &str = r"
local ops = cjson.decode(ARGV[2])
for i, op in ipairs(ops) do
  if op.fields then
    for _, field in ipairs(op.fields) do
      if (redis.call('HGET', KEYS[i], field[1]) or '') ~= field[2] then return 0 end
    end
    if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end
  elseif op.was then
    if redis.call('GET', KEYS[i]) ~= op.was then return 0 end
  elseif redis.call('EXISTS', KEYS[i]) == 1 then return 0 end
end
local time = redis.call('TIME')
local ms = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
for i, op in ipairs(ops) do
  if op.fields then
    for _, field in ipairs(op.fields) do redis.call('HSET', KEYS[i], field[1], field[3]) end
  elseif op.gone then redis.call('DEL', KEYS[i])
  elseif op.was then redis.call('SET', KEYS[i], op.now, 'KEEPTTL')
  else redis.call('SET', KEYS[i], op.now) end
end
if ARGV[1] ~= '' then
  for i, op in ipairs(ops) do redis.call('PUBLISH', ARGV[1], op.hex .. ' ' .. ms) end
end
return 1
";

/// Atomic for each key. `ARGV[1]` is the channel, or empty; then for each key its expected value, as JSON. Returns the numbers
/// of those that have another one by now, which stay, after how many were removed.
const REMOVE: &str = r"
local time = redis.call('TIME')
local ms = time[1] .. string.format('%03d', math.floor(time[2] / 1000))
local ops = cjson.decode(ARGV[2])
local said = {0}
for i, op in ipairs(ops) do
  local key, same = KEYS[i], true
  if op.fields then
    for _, field in ipairs(op.fields) do
      same = same and (redis.pcall('HGET', key, field[1]) or '') == field[2]
    end
  else
    same = redis.pcall('GET', key) == op.was
  end
  if not same then
    said[#said + 1] = i
  elseif redis.call('DEL', key) == 1 then
    said[1] = said[1] + 1
    if ARGV[1] ~= '' then redis.call('PUBLISH', ARGV[1], op.hex .. ' ' .. ms) end
  end
end
return said
";

pub struct RedisAdmin {
    link: RedisConnection,
    connector: Connector,
    keys: Keys,
    channel: Option<String>,
    default_scopes: Vec<String>,
    /// Records that could not be read, by their digest.
    unreadable: BTreeMap<[u8; 32], String>,
    /// Records read or changed, for who waits.
    count: Arc<AtomicU64>,
}

/// The change of one key.
struct Step {
    digest: Digest,
    what: Json,
}

impl Step {
    fn add(record: &TokenRecord) -> Self {
        Self { digest: record.digest, what: json!({ "hex": record.digest.to_hex(), "now": to_json(record) }) }
    }

    fn edit(digest: Digest, was: &Stored, edit: &[(&str, Json)]) -> Result<Self, AdminError> {
        let hex = digest.to_hex();
        let what = match was {
            Stored::Json(text) => {
                let now = edited(text, edit).map_err(|wrong| wrong.of(digest))?;
                json!({ "hex": hex, "was": text, "now": now })
            }
            Stored::Hash(fields) => {
                let text = |value: &Json| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let fields: Vec<_> =
                    edit.iter().map(|(name, value)| json!([name, field_of(fields, name), text(value)])).collect();
                json!({ "hex": hex, "fields": fields })
            }
        };
        Ok(Self { digest, what })
    }
}

/// A field of a hash; empty for none.
fn field_of<'a>(fields: &'a [(String, String)], name: &str) -> &'a str {
    fields.iter().find(|(other, _)| other == name).map_or("", |(_, value)| value)
}

fn broken(error: &RedisError) -> AdminError {
    failed(error).into()
}

impl RedisAdmin {
    pub async fn open(settings: &RedisSettings) -> Result<Self, AdminError> {
        let connector = Connector::new(settings)?.with_answer(ANSWER);
        let channel = match &settings.changes {
            RedisChanges::Channel(name) => Some(name.clone()),
            RedisChanges::Keyspace | RedisChanges::None => None,
        };
        let keys = Keys { prefix: settings.prefix.clone() };
        let default_scopes = settings.default_scopes.clone();
        Ok(Self {
            link: connector.open().await?,
            connector,
            keys,
            channel,
            default_scopes,
            unreadable: BTreeMap::new(),
            count: Arc::default(),
        })
    }

    fn is_cluster(&self) -> bool {
        *self.connector.topology() == Topology::Cluster
    }

    /// Returns whether all keys still had their expected values.
    async fn change(&mut self, steps: &[Step]) -> Result<bool, AdminError> {
        let mut command = redis::cmd("EVAL");
        command.arg(CHANGE).arg(steps.len());
        for step in steps {
            command.arg(self.keys.token(&step.digest));
        }
        let ops: Vec<_> = steps.iter().map(|step| &step.what).collect();
        command.arg(self.channel.as_deref().unwrap_or_default()).arg(json!(ops).to_string());
        Ok(self.link.ask::<i64>(&command).await? == 1)
    }

    async fn get(&mut self, digest: &Digest) -> Result<Option<(Stored, TokenRecord)>, AdminError> {
        let questions = questions(self.connector.topology(), &self.keys.token(digest));
        for _ in 0..ATTEMPTS {
            let mut answers: Vec<Value> = Vec::with_capacity(2);
            for question in &questions {
                if is_open(&answers) {
                    let more: Vec<Value> =
                        question.query_async(&mut self.link).await.map_err(|error| broken(&error))?;
                    answers.extend(more);
                }
            }
            match stored(&answers, *digest)? {
                Found::Record(stored) => {
                    let record = self.parse(&stored, *digest)?;
                    return Ok(Some((stored, record)));
                }
                Found::Nothing => return Ok(None),
                Found::Changing => {}
            }
        }
        Err(contended(*digest))
    }

    fn parse(&self, stored: &Stored, digest: Digest) -> Result<TokenRecord, AdminError> {
        Ok(stored.parse(digest, &self.default_scopes).map_err(|wrong| wrong.of(digest))?)
    }

    /// Passes on the records whose digest begins with these digits, in no order, some of them twice, until `each` says that
    /// it is enough. Those that cannot be read are noted and left out. With a user, some records of others are passed over.
    async fn scan(
        &mut self,
        hex: &str,
        user: Option<&str>,
        mut each: impl FnMut(TokenRecord) -> ControlFlow<()> + Send,
    ) -> Result<(), AdminError> {
        let pattern = self.keys.pattern(hex);
        let count = if user.is_some() { SCANNED } else { BATCH };
        for _ in 0..ATTEMPTS {
            let before = self.connector.layout().await?;
            let nodes = if self.is_cluster() { self.connector.masters().await? } else { vec![self.link.clone()] };
            for mut node in nodes {
                let mut cursor = 0_u64;
                loop {
                    let page = redis::cmd("SCAN").arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(count).take();
                    let (next, keys): (u64, Vec<Vec<u8>>) = node.ask(&page).await?;
                    let keys = keys.into_iter().filter_map(|key| String::from_utf8(key).ok());
                    let digests: Vec<_> = keys.filter_map(|key| self.keys.digest(&key)).collect();
                    self.count.fetch_add(digests.len() as u64, Ordering::Relaxed);
                    for (digest, record) in self.read_at(&mut node, &digests, user).await? {
                        match record {
                            Ok(Some(record)) => {
                                if each(record).is_break() {
                                    return Ok(());
                                }
                            }
                            Ok(None) => {}
                            Err(why) => drop(self.unreadable.insert(*digest.as_bytes(), why)),
                        }
                    }
                    cursor = next;
                    if cursor == 0 {
                        break;
                    }
                }
            }
            // A key that moved from a node that was not scanned yet to one that was is on neither list.
            if self.connector.layout().await? == before {
                return Ok(());
            }
        }
        Err(AdminError::Store("the cluster moves slots all the time: try again when it is done".into()))
    }

    /// Those of some tokens that a query takes, as they are stored now.
    async fn judged(&mut self, digests: &[Digest], query: &TokenQuery) -> Result<Vec<(Digest, Stored)>, AdminError> {
        let mut taken = Vec::new();
        for (digest, found) in digests.iter().zip(self.several(digests).await?) {
            taken.extend(found.filter(|(_, record)| query.takes(record)).map(|(stored, _)| (*digest, stored)));
        }
        Ok(taken)
    }

    /// Removes those that are stored as they were. Returns how many, and those that are not.
    async fn remove_unchanged(&mut self, tokens: &[(Digest, Stored)]) -> Result<(u64, Vec<Digest>), AdminError> {
        if tokens.is_empty() {
            return Ok((0, Vec::new()));
        }
        let expected = tokens.iter().map(|(digest, stored)| match stored {
            Stored::Json(text) => json!({ "hex": digest.to_hex(), "was": text }),
            // Those that tollgate reads; others may have any bytes.
            Stored::Hash(fields) => {
                let fields = RecordField::ALL.map(|field| json!([field.name(), field_of(fields, field.name())]));
                json!({ "hex": digest.to_hex(), "fields": fields })
            }
        });
        let mut command = redis::cmd("EVAL");
        command.arg(REMOVE).arg(tokens.len());
        command.arg(tokens.iter().map(|(digest, _)| self.keys.token(digest)).collect::<Vec<_>>());
        command.arg(self.channel.as_deref().unwrap_or_default()).arg(Json::from_iter(expected).to_string());
        let said: Vec<u64> = self.link.ask(&command).await?;
        let (gone, changed) = said.split_first().ok_or_else(|| AdminError::Store("a script has no result".into()))?;
        let nth = |number: &u64| usize::try_from(*number).ok().and_then(|number| tokens.get(number.checked_sub(1)?));
        Ok((*gone, changed.iter().filter_map(nth).map(|(digest, _)| *digest).collect()))
    }

    async fn block_one(&mut self, digest: Digest, user: &str, blocked: bool) -> Result<bool, AdminError> {
        for _ in 0..ATTEMPTS {
            let Some((was, now)) = self.get(&digest).await? else { return Ok(false) };
            if now.user != user || now.blocked == blocked {
                return Ok(false);
            }
            if self.change(&[Step::edit(digest, &was, &[("blocked", blocked.into())])?]).await? {
                return Ok(true);
            }
        }
        Err(contended(digest))
    }

    /// Reads some tokens, and passes on those that can be read.
    async fn visit_those(&mut self, digests: &[Digest], each: Visitor<'_>) -> Result<(), AdminError> {
        let records = if self.is_cluster() {
            let mut records = Vec::with_capacity(digests.len());
            for digest in digests {
                records.push((*digest, only_record(self.get(digest).await)?));
            }
            records
        } else {
            let mut node = self.link.clone();
            self.read_at(&mut node, digests, None).await?
        };
        for (digest, record) in records {
            match record {
                Ok(Some(record)) => each(record)?,
                Ok(None) => {}
                Err(why) => drop(self.unreadable.insert(*digest.as_bytes(), why)),
            }
        }
        Ok(())
    }

    /// The records of some keys on a node that has them, or had them a moment ago. An error is what is wrong with a record.
    async fn read_at(
        &mut self,
        node: &mut RedisConnection,
        digests: &[Digest],
        user: Option<&str>,
    ) -> Result<Vec<(Digest, Result<Option<TokenRecord>, String>)>, AdminError> {
        let mut records = Vec::new();
        let texts = self.ask_each(node, "GET", digests).await?;
        let hashes: Vec<Digest> =
            digests.iter().zip(&texts).filter(|(_, text)| is_wrong_type(text)).map(|(digest, _)| *digest).collect();
        let mut hashes = self.ask_each(node, "HGETALL", &hashes).await?.into_iter();
        for (digest, text) in digests.iter().zip(texts) {
            if user.is_some_and(|user| is_of_another(&text, user)) {
                continue;
            }
            let hash = if is_wrong_type(&text) { hashes.next() } else { None };
            let answers: Vec<Value> = [Some(text), hash].into_iter().flatten().collect();
            let record = match stored(&answers, *digest) {
                _ if self.is_cluster() && answers.iter().any(is_elsewhere) => self.get(digest).await,
                Ok(Found::Record(stored)) => self.parse(&stored, *digest).map(|record| Some((stored, record))),
                Ok(Found::Nothing) => Ok(None),
                Ok(Found::Changing) => self.get(digest).await,
                Err(error) => Err(error.into()),
            };
            records.push((*digest, only_record(record)?));
        }
        Ok(records)
    }

    /// The replies to one command for each key.
    async fn ask_each(
        &self,
        node: &mut RedisConnection,
        command: &str,
        digests: &[Digest],
    ) -> Result<Vec<Value>, AdminError> {
        if digests.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipe = redis::Pipeline::new();
        pipe.ignore_errors();
        for digest in digests {
            pipe.cmd(command).arg(self.keys.token(digest));
        }
        pipe.query_async(node).await.map_err(|error| broken(&error))
    }

    /// Every record once, in no order; of one user, if one is named.
    async fn all(&mut self, user: Option<&str>) -> Result<Vec<TokenRecord>, AdminError> {
        // A scan may return a key twice.
        let mut found = BTreeMap::new();
        self.scan("", user, |record| {
            if user.is_none_or(|user| record.user == user) {
                found.insert(*record.digest.as_bytes(), record);
            }
            ControlFlow::Continue(())
        })
        .await?;
        Ok(found.into_values().collect())
    }

    /// The records of some tokens, in their order.
    async fn several(&mut self, digests: &[Digest]) -> Result<Vec<Option<(Stored, TokenRecord)>>, AdminError> {
        let mut records = Vec::with_capacity(digests.len());
        if self.is_cluster() {
            for digest in digests {
                records.push(self.get(digest).await?);
            }
            return Ok(records);
        }
        if digests.is_empty() {
            return Ok(records);
        }
        let mut pipe = redis::Pipeline::new();
        pipe.ignore_errors();
        digests.iter().for_each(|digest| read(&mut pipe, &self.keys.token(digest)));
        let answers: Vec<Value> = pipe.query_async(&mut self.link).await.map_err(|error| broken(&error))?;
        for (digest, answers) in digests.iter().zip(answers.chunks(2)) {
            records.push(match stored(answers, *digest)? {
                Found::Record(stored) => {
                    let record = self.parse(&stored, *digest)?;
                    Some((stored, record))
                }
                Found::Nothing => None,
                Found::Changing => self.get(digest).await?,
            });
        }
        Ok(records)
    }

    async fn now_ms(&mut self) -> Result<u64, AdminError> {
        let (seconds, micros): (u64, u64) = self.link.ask(&redis::cmd("TIME")).await?;
        Ok(seconds * 1000 + micros / 1000)
    }

    /// Returns which tokens were new.
    async fn add(&mut self, batch: &[(Digest, String)]) -> Result<Vec<Digest>, AdminError> {
        let is_new = |value: &Value| !matches!(value, Value::Nil);
        let set =
            |digest: &Digest, text: &str| redis::cmd("SET").arg(self.keys.token(digest)).arg(text).arg("NX").take();
        let answers: Vec<Value> = if self.is_cluster() {
            // Each to its own node, many at once.
            let commands: Vec<_> = batch.iter().map(|(digest, text)| (self.link.clone(), set(digest, text))).collect();
            let sets = commands.into_iter().map(|(mut link, set)| async move { link.ask::<Value>(&set).await });
            stream::iter(sets).buffered(256).collect::<Vec<_>>().await.into_iter().collect::<Result<_, _>>()?
        } else {
            let mut pipe = redis::Pipeline::new();
            for (digest, text) in batch {
                pipe.add_command(set(digest, text));
            }
            pipe.query_async(&mut self.link).await.map_err(|error| broken(&error))?
        };
        Ok(batch.iter().zip(&answers).filter(|(_, answer)| is_new(answer)).map(|((digest, _), _)| *digest).collect())
    }

    /// Gateways are subscribed on every master of a cluster, so that one of them is enough.
    async fn tell(&mut self, messages: &[String]) -> Result<(), AdminError> {
        let Some(channel) = self.channel.clone() else { return Ok(()) };
        let mut node = match self.is_cluster() {
            true => self.connector.masters().await?.into_iter().next().ok_or_else(no_master)?,
            false => self.link.clone(),
        };
        for messages in messages.chunks(BATCH) {
            let mut pipe = redis::Pipeline::new();
            for message in messages {
                pipe.cmd("PUBLISH").arg(&channel).arg(message);
            }
            pipe.query_async::<Value>(&mut node).await.map_err(|error| broken(&error))?;
        }
        Ok(())
    }

    /// Published on every master of a cluster, whose changes it is behind.
    async fn tell_wait(&mut self, id: &str) -> Result<(), AdminError> {
        let Some(channel) = self.channel.clone() else { return Ok(()) };
        let message = redis::cmd("PUBLISH").arg(channel).arg(format!("wait {id}")).take();
        for mut node in self.connector.masters().await? {
            node.ask::<Value>(&message).await?;
        }
        Ok(())
    }
}

/// Whether a JSON record cannot be this user's, without reading it: a name without escapes stands there as it is.
fn is_of_another(text: &Value, user: &str) -> bool {
    let Value::BulkString(text) = text else { return false };
    !text.contains(&b'\\') && memchr::memmem::find(text, user.as_bytes()).is_none()
}

fn no_master() -> AdminError {
    AdminError::Store("no node of the cluster has slots: see CLUSTER SLOTS".into())
}

/// What is wrong with one record, told apart from what ends the work.
fn only_record(
    found: Result<Option<(Stored, TokenRecord)>, AdminError>,
) -> Result<Result<Option<TokenRecord>, String>, AdminError> {
    match found {
        Ok(found) => Ok(Ok(found.map(|(_, record)| record))),
        Err(AdminError::Unreadable(why)) => Ok(Err(why)),
        Err(error) => Err(error),
    }
}

/// The key is on another node, or on its way there.
fn is_elsewhere(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if matches!(error.code(), "MOVED" | "ASK" | "TRYAGAIN"))
}

fn contended(digest: Digest) -> AdminError {
    AdminError::Store(format!("token {}: somebody else changes it all the time; try again", digest.id()))
}

#[async_trait]
impl TokenAdmin for RedisAdmin {
    async fn create(&mut self, record: &TokenRecord) -> Result<(), AdminError> {
        if self.change(&[Step::add(record)]).await? { Ok(()) } else { Err(AdminError::Exists) }
    }

    /// Everything is read before the first record is written, so an invalid input changes nothing. If the server fails
    /// in the middle, the first part remains written, because a transaction cannot hold millions. Importing again adds
    /// the rest.
    async fn import(&mut self, records: Records<'_>) -> Result<Imported, AdminError> {
        let mut all = Vec::new();
        for record in records {
            let record = record?;
            all.push((record.digest, to_json(&record)));
        }
        let (mut new, mut count) = (Vec::new(), 0);
        let mut differing = Differing::default();
        for batch in all.chunks(BATCH) {
            let added = self.add(batch).await.map_err(|error| {
                AdminError::Store(format!(
                    "{error}; {count} new tokens were written before: import again to add the rest"
                ))
            })?;
            count += added.len();
            // A token that is in the input twice was added by its first entry.
            let mut added_here: HashSet<Digest> = added.iter().copied().collect();
            let known: Vec<_> = batch.iter().filter(|(digest, _)| !added_here.remove(digest)).collect();
            let digests: Vec<_> = known.iter().map(|(digest, _)| *digest).collect();
            for ((digest, given), known) in known.iter().zip(self.several(&digests).await?) {
                let given = self.parse(&Stored::Json(given.clone()), *digest)?;
                if let Some((_, known)) = known {
                    differing.compare(&known, &given);
                }
            }
            if count <= NAMED {
                new.extend(added);
            }
        }
        let at = self.now_ms().await?;
        let messages = match count {
            0..=NAMED => new.iter().map(|digest| format!("{} {at}", digest.to_hex())).collect(),
            _ => vec![format!("* {at}")],
        };
        self.tell(&messages).await?;
        Ok(Imported { new: count as u64, differing })
    }

    async fn list(&mut self) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records = self.all(None).await?;
        records.sort_by_key(|record| Reverse(record.created));
        Ok(records)
    }

    /// Their order takes 64 bytes for each that is meant; the records are read again in that order.
    async fn select(&mut self, query: &TokenQuery, each: Visitor<'_>) -> Result<(), AdminError> {
        let mut order: Vec<TokenRank> = Vec::new();
        self.scan("", query.user.as_deref(), |record| {
            order.extend(query.place(&record));
            ControlFlow::Continue(())
        })
        .await?;
        order.sort_unstable();
        order.dedup();
        order.truncate(query.limit.unwrap_or(usize::MAX));
        let mut taken = |record: TokenRecord| if query.takes(&record) { each(record) } else { Ok(()) };
        for batch in order.chunks(BATCH) {
            let digests: Vec<_> = batch.iter().map(TokenRank::digest).collect();
            self.visit_those(&digests, &mut taken).await?;
        }
        Ok(())
    }

    async fn of_user(&mut self, user: &str) -> Result<Vec<TokenRecord>, AdminError> {
        let mut records = self.all(Some(user)).await?;
        records.sort_by_key(|record| Reverse(record.created));
        Ok(records)
    }

    async fn blocked_users(&mut self) -> Result<BTreeSet<String>, AdminError> {
        let mut users = BTreeSet::new();
        self.scan("", None, |record| {
            if record.blocked {
                users.insert(record.user);
            }
            ControlFlow::Continue(())
        })
        .await?;
        Ok(users)
    }

    fn count_into(&mut self, count: Arc<AtomicU64>) {
        self.count = count;
    }

    fn take_unreadable(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unreadable).into_values().collect()
    }

    async fn find(&mut self, hex_prefix: &str) -> Result<Vec<TokenRecord>, AdminError> {
        let hex = hex_prefix.to_ascii_lowercase();
        if hex.len() > 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Vec::new());
        }
        match Digest::from_hex(&hex) {
            Some(digest) => Ok(self.get(&digest).await?.map(|(_, record)| record).into_iter().collect()),
            None => {
                let mut found = BTreeMap::new();
                self.scan(&hex, None, |record| {
                    found.insert(*record.digest.as_bytes(), record);
                    if found.len() < FOUND_MOST { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                })
                .await?;
                Ok(found.into_values().collect())
            }
        }
    }

    async fn revoke(&mut self, digest: &Digest, at: u64) -> Result<bool, AdminError> {
        for _ in 0..ATTEMPTS {
            let (was, record) = self.get(digest).await?.ok_or(AdminError::Missing)?;
            if record.revoked.is_some() {
                return Ok(false);
            }
            if self.change(&[Step::edit(*digest, &was, &[("revoked", at.into())])?]).await? {
                return Ok(true);
            }
        }
        Err(contended(*digest))
    }

    /// One after the other: after a failure the others are unchanged, and repeating the command continues.
    async fn revoke_user(&mut self, user: &str, at: u64) -> Result<u64, AdminError> {
        let mut open = BTreeSet::new();
        self.scan("", Some(user), |record| {
            if record.user == user && record.revoked.is_none() {
                open.insert(*record.digest.as_bytes());
            }
            ControlFlow::Continue(())
        })
        .await?;
        let mut revoked = 0;
        for digest in open {
            match self.revoke(&Digest::from_bytes(digest), at).await {
                Ok(now) => revoked += u64::from(now),
                Err(AdminError::Missing) => {}
                Err(error) => return Err(error),
            }
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(revoked)
    }

    async fn remove(&mut self, digests: &[Digest], still: &TokenQuery) -> Result<u64, AdminError> {
        let mut removed = 0;
        // In a cluster, a script reaches one slot.
        for some in digests.chunks(if self.is_cluster() { 1 } else { REMOVED_AT_ONCE }) {
            let (mut open, mut attempts) = (some.to_vec(), 0);
            while let Some(first) = open.first().copied() {
                if attempts == ATTEMPTS {
                    return Err(contended(first));
                }
                attempts += 1;
                let taken = self.judged(&open, still).await?;
                let (gone, changed) = self.remove_unchanged(&taken).await?;
                removed += gone;
                open = changed;
            }
        }
        Ok(removed)
    }

    /// In a cluster the new token is written first. If the second step fails it is removed again; at worst a token
    /// remains that was never printed.
    async fn rotate(&mut self, old: &Digest, next: &TokenRecord, at: u64, end: u64) -> Result<(), AdminError> {
        let next = TokenRecord { replaces: Some(*old), ..next.clone() };
        for _ in 0..ATTEMPTS {
            let (was, record) = self.get(old).await?.ok_or(AdminError::Missing)?;
            let end = record.rotated_out(at, end)?;
            let supersede = Step::edit(*old, &was, &[("superseded", at.into()), ("expires", end.into())])?;
            let done = if self.is_cluster() {
                self.create(&next).await?;
                let done = self.change(&[supersede]).await;
                if !matches!(done, Ok(true)) {
                    let what = json!({ "hex": next.digest.to_hex(), "was": to_json(&next), "gone": true });
                    self.change(&[Step { digest: next.digest, what }]).await?;
                }
                done?
            } else {
                if self.get(&next.digest).await?.is_some() {
                    return Err(AdminError::Exists);
                }
                self.change(&[Step::add(&next), supersede]).await?
            };
            if done {
                return Ok(());
            }
        }
        Err(contended(*old))
    }

    async fn block(&mut self, user: &str, blocked: bool) -> Result<u64, AdminError> {
        self.block_each(user, blocked, &mut |_| Ok(()), &mut |_| Ok(())).await
    }

    /// All keys are read once, since there is no index by user. The user's tokens are changed one after the other: after a
    /// failure the others are unchanged, and repeating the command continues.
    async fn block_each(
        &mut self,
        user: &str,
        blocked: bool,
        before: Visitor<'_>,
        now: Visitor<'_>,
    ) -> Result<u64, AdminError> {
        // There may be very many: 32 bytes of each are kept.
        let (mut found, mut open, mut visited) = (BTreeSet::new(), Vec::new(), Ok(()));
        self.scan("", Some(user), |record| {
            if record.user == user && found.insert(*record.digest.as_bytes()) {
                if record.blocked != blocked {
                    open.push(record.digest);
                }
                visited = before(record);
            }
            if visited.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })
        .await?;
        visited?;
        let mut changed = 0;
        for digest in open {
            changed += u64::from(self.block_one(digest, user, blocked).await?);
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        let found: Vec<_> = found.into_iter().map(Digest::from_bytes).collect();
        let mut of_user = |record: TokenRecord| if record.user == user { now(record) } else { Ok(()) };
        for batch in found.chunks(BATCH) {
            self.visit_those(batch, &mut of_user).await?;
        }
        Ok(changed)
    }

    async fn wait(&mut self, limit: Duration) -> Result<Vec<String>, AdminError> {
        if self.channel.is_none() {
            return Err(AdminError::NoRegister("a Redis store without a channel"));
        }
        let id = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let (begun, kept) = (self.now_ms().await?, WAIT_KEPT.as_secs());
        let waits = self.keys.waits();
        // Stored for gateways that are just connecting, then published to those that are subscribed.
        self.link.ask::<Value>(redis::cmd("ZADD").arg(&waits).arg(begun).arg(&id)).await?;
        self.link.ask::<Value>(redis::cmd("EXPIRE").arg(&waits).arg(kept)).await?;
        let over = begun.saturating_sub(kept * 1000);
        self.link.ask::<Value>(redis::cmd("ZREMRANGEBYSCORE").arg(&waits).arg("-inf").arg(over)).await?;
        let waiting = Confirmations::within(limit);
        let mut said: Option<Instant> = None;
        loop {
            if said.is_none_or(|said| said.elapsed() >= WAIT_REPEAT) {
                self.tell_wait(&id).await?;
                said = Some(Instant::now());
            }
            let gone = u64::try_from(REPLICA_GONE.as_millis()).unwrap_or(u64::MAX);
            let since = self.now_ms().await?.saturating_sub(gone);
            let register = redis::cmd("ZRANGEBYSCORE").arg(self.keys.replicas()).arg(since).arg("+inf").take();
            let mut running: Vec<String> = self.link.ask(&register).await?;
            running.sort();
            let confirmed: HashSet<String> =
                self.link.ask(redis::cmd("SMEMBERS").arg(self.keys.confirmed(&id))).await?;
            let with_state = |name: String| {
                let done = confirmed.contains(&name);
                (name, done)
            };
            if let Some(outcome) = waiting.outcome(running.into_iter().map(with_state).collect()).await {
                return outcome;
            }
        }
    }
}
