//! The state against a model of a pool that loses events, forgets deletions, cuts listings short, repeats answers and
//! fails over to an older database.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use super::*;
use crate::event::{Event, Operation};
use crate::value::Value;
use crate::vm;
use proptest::prelude::*;

/// A database with generations, as xapi's.
#[derive(Clone, Default)]
struct Pool {
    objects: BTreeMap<String, (String, u64)>,
    deleted: Vec<(String, u64)>,
    generation: u64,
}

impl Pool {
    fn set(&mut self, name: &str, label: u32) {
        self.generation += 1;
        self.objects.insert(name.to_owned(), (label.to_string(), self.generation));
    }

    fn remove(&mut self, name: &str) {
        if self.objects.remove(name).is_some() {
            self.generation += 1;
            self.deleted.push((name.to_owned(), self.generation));
        }
    }

    fn event(reference: &str, operation: Operation, label: Option<&str>) -> Event {
        let record = |label: &str| Value::Map([("name_label".to_owned(), Value::from(label))].into());
        Event { class: "vm".into(), operation, reference: reference.to_owned(), snapshot: label.map(record) }
    }

    fn answer(&self, token: &str) -> EventBatch {
        let since: u64 = if token.is_empty() { 0 } else { token.parse().unwrap() };
        let operation = if since == 0 { Operation::Add } else { Operation::Mod };
        let mut events: Vec<Event> = self
            .objects
            .iter()
            .filter(|(_, (_, at))| *at > since)
            .map(|(name, (label, _))| Self::event(name, operation.clone(), Some(label)))
            .collect();
        let gone = self.deleted.iter().filter(|(name, at)| *at > since && !self.objects.contains_key(name));
        events.extend(gone.map(|(name, _)| Self::event(name, Operation::Del, None)));
        let count = i64::try_from(self.objects.len()).unwrap();
        // The first generation must not be the empty token's.
        let token = self.generation.max(1).to_string();
        EventBatch { events, valid_ref_counts: [("vm".to_owned(), count)].into(), token }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Set(u8, u32),
    Remove(u8),
    /// Deletions are not remembered any more.
    Forget,
    /// Another coordinator, with the database of an earlier moment, and a new login.
    FailOver,
    /// A new login at the same coordinator.
    Relogin,
    /// Question and answer.
    Ask,
    /// The answer has lost these events (by position), as if it had been cut short.
    AskCut(u8),
    /// The answer comes twice, the second time after a further question was asked.
    AskTwice,
    /// The answer comes after a new login at another coordinator.
    AskLate,
    /// The pool says that the token is lost.
    LoseToken,
    /// The question fails.
    Fail,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..12_u8, any::<u32>()).prop_map(|(name, label)| Step::Set(name, label)),
        2 => (0..12_u8).prop_map(Step::Remove),
        1 => Just(Step::Forget),
        1 => Just(Step::FailOver),
        1 => Just(Step::Relogin),
        4 => Just(Step::Ask),
        1 => any::<u8>().prop_map(Step::AskCut),
        1 => Just(Step::AskTwice),
        1 => Just(Step::AskLate),
        1 => Just(Step::LoseToken),
        1 => Just(Step::Fail),
    ];
    prop::collection::vec(step, 1..60)
}

/// The client, with a copy that is only kept by the changes that are told.
struct Client {
    state: State,
    told: BTreeMap<String, String>,
    login: u64,
}

impl Client {
    /// Takes an answer; what is told to be gone must not be there in `pool`.
    fn take(&mut self, pool: &Pool, question: &Question, login: u64, batch: EventBatch) -> Result<(), TestCaseError> {
        let Some(changes) = self.state.answer(question, login, Answer::read(batch)) else { return Ok(()) };
        for change in changes {
            let Change::Vm(delta) = change else { continue };
            let name = delta.reference.as_str().to_owned();
            let before = delta.before.map(|record| record.name_label.clone());
            prop_assert_eq!(self.told.get(&name).cloned(), before);
            match delta.after {
                Some(record) => drop(self.told.insert(name, record.name_label.clone())),
                None => {
                    prop_assert!(!pool.objects.contains_key(&name), "{} is there and was told to be gone", name);
                    self.told.remove(&name);
                }
            }
        }
        Ok(())
    }

    fn shown(&self) -> BTreeMap<String, String> {
        let table = <vm::Record as super::super::Cached>::table(&self.state.tables);
        table.iter().map(|(reference, record)| (reference.as_str().to_owned(), record.name_label.clone())).collect()
    }
}

fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut pool = Pool::default();
    let mut earlier = pool.clone();
    let mut client = Client { state: State::new(vec![ObjectClass::Vm]), told: BTreeMap::new(), login: 1 };
    for (at, step) in steps.into_iter().enumerate() {
        if at % 7 == 0 {
            earlier = pool.clone();
        }
        match step {
            Step::Set(name, label) => pool.set(&format!("OpaqueRef:{name}"), label),
            Step::Remove(name) => pool.remove(&format!("OpaqueRef:{name}")),
            Step::Forget => pool.deleted.clear(),
            Step::FailOver => {
                pool = earlier.clone();
                client.login += 1;
            }
            Step::Relogin => client.login += 1,
            Step::LoseToken => client.state.lose_token(),
            Step::Fail => drop(client.state.question(client.login)),
            Step::Ask | Step::AskCut(_) | Step::AskTwice | Step::AskLate => {
                let question = client.state.question(client.login);
                let mut batch = pool.answer(&question.token);
                match step {
                    Step::AskCut(keep) => {
                        // Events that are lost in the middle of following are told by the numbers, see the end.
                        let keep = usize::from(keep) % (batch.events.len() + 1);
                        batch.events.truncate(keep);
                        client.take(&pool, &question, client.login, batch)?;
                    }
                    Step::AskTwice => {
                        client.take(&pool, &question, client.login, batch.clone())?;
                        let next = client.state.question(client.login);
                        let before = client.shown();
                        prop_assert!(client.state.answer(&question, client.login, Answer::read(batch)).is_none());
                        prop_assert_eq!(client.shown(), before);
                        let batch = pool.answer(&next.token);
                        client.take(&pool, &next, client.login, batch)?;
                    }
                    Step::AskLate => {
                        pool = earlier.clone();
                        client.login += 1;
                        prop_assert!(client.state.answer(&question, client.login, Answer::read(batch)).is_none());
                    }
                    _ => client.take(&pool, &question, client.login, batch)?,
                }
            }
        }
        prop_assert_eq!(&client.shown(), &client.told);
    }
    // Whatever happened, one whole listing sets everything right.
    client.state.lose_token();
    let question = client.state.question(client.login);
    let batch = pool.answer(&question.token);
    client.take(&pool, &question, client.login, batch)?;
    let truth: BTreeMap<_, _> = pool.objects.iter().map(|(name, (label, _))| (name.clone(), label.clone())).collect();
    prop_assert_eq!(client.shown(), truth);
    prop_assert!(client.state.complete);
    Ok(())
}

proptest! {
    #[test]
    fn x08_nothing_that_is_there_is_told_to_be_gone_and_a_listing_sets_everything_right(steps in steps()) {
        run(steps)?;
    }
}

#[test]
fn x08_a_listing_that_is_cut_short_removes_nothing_and_the_numbers_give_it_away() {
    let mut pool = Pool::default();
    for name in 0..5 {
        pool.set(&format!("OpaqueRef:{name}"), name);
    }
    let mut state = State::new(vec![ObjectClass::Vm]);
    let question = state.question(1);
    state.answer(&question, 1, Answer::read(pool.answer(""))).unwrap();
    pool.remove("OpaqueRef:0");
    state.lose_token();
    let question = state.question(1);
    let mut cut = pool.answer("");
    cut.events.truncate(2);
    assert!(state.answer(&question, 1, Answer::read(cut)).unwrap().is_empty());
    assert!(!state.complete && state.tables.count(ObjectClass::Vm) == 5);
    // Deletions that the pool has forgotten: an answer without events is enough to see that something is missing.
    pool.deleted.clear();
    let question = state.question(1);
    assert!(!question.is_listing());
    state.answer(&question, 1, Answer::read(pool.answer(&question.token))).unwrap();
    assert!(!state.complete);
}

#[test]
fn a_record_that_can_not_be_read_hides_no_object_that_was_known() {
    let mut pool = Pool::default();
    pool.set("OpaqueRef:1", 7);
    let mut state = State::new(vec![ObjectClass::Vm]);
    let question = state.question(1);
    state.answer(&question, 1, Answer::read(pool.answer(""))).unwrap();
    pool.set("OpaqueRef:2", 8);
    state.lose_token();
    let question = state.question(1);
    let mut batch = pool.answer("");
    for event in &mut batch.events {
        event.snapshot = Some(Value::Int(1));
    }
    assert!(state.answer(&question, 1, Answer::read(batch)).unwrap().is_empty());
    // Known to exist, so the numbers fit.
    assert!(state.complete && state.tables.hidden() == 1);
}
