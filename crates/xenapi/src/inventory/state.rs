//! What is known of a pool, and how answers of `event.from` change it. Pure: no clock, no network.
//!
//! Rules that everything else leans on:
//! - An answer counts once, and only if it belongs to the last question and to the login that is in place now. A token
//!   of an earlier login may be one of an earlier coordinator, which would hide changes.
//! - A question without a token is a listing. An object that is missing in it is gone only if the listing has as many
//!   objects of the class as the pool says there are: a listing that is cut short removes nothing.

use super::classes::{Change, ObjectClass, Sighting, Tables, expected};
use crate::event::EventBatch;
use std::collections::{BTreeMap, HashMap, HashSet};

/// What to ask the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Empty for a listing.
    pub(super) token: String,
    /// The login that it is asked in.
    pub(super) login: u64,
    number: u64,
}

impl Question {
    pub(super) fn is_listing(&self) -> bool {
        self.token.is_empty()
    }
}

/// An answer of `event.from`, typed.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) sightings: Vec<Sighting>,
    counts: BTreeMap<String, i64>,
    token: String,
}

impl Answer {
    /// Reads the records. Takes some time for a large batch.
    pub(super) fn read(batch: EventBatch) -> Self {
        // One after the other, so that the untyped records of a listing are gone when the typed ones are there.
        let sightings = batch.events.into_iter().filter_map(Sighting::of).collect();
        Self { sightings, counts: batch.valid_ref_counts, token: batch.token }
    }
}

struct Token {
    text: String,
    login: u64,
}

pub(super) struct State {
    classes: Vec<ObjectClass>,
    pub(super) tables: Tables,
    token: Option<Token>,
    /// The number of the last question, until it is answered.
    asked: Option<u64>,
    questions: u64,
    pub(super) revision: u64,
    pub(super) loads: u64,
    pub(super) events: u64,
    /// Whether the numbers of objects were those that the pool named, at its last answer.
    pub(super) complete: bool,
}

impl State {
    pub(super) fn new(classes: Vec<ObjectClass>) -> Self {
        Self {
            classes,
            tables: Tables::default(),
            token: None,
            asked: None,
            questions: 0,
            revision: 0,
            loads: 0,
            events: 0,
            complete: false,
        }
    }

    pub(super) fn classes(&self) -> &[ObjectClass] {
        &self.classes
    }

    /// The next question, asked in `login`.
    pub(super) fn question(&mut self, login: u64) -> Question {
        self.questions += 1;
        self.asked = Some(self.questions);
        let token = self.token.as_ref().filter(|token| token.login == login);
        let token = token.map(|token| token.text.clone()).unwrap_or_default();
        Question { token, login, number: self.questions }
    }

    /// The token is worth nothing any more: the next question is a listing.
    pub(super) fn lose_token(&mut self) {
        self.token = None;
    }

    /// Takes an answer over; `login` is the one that is in place now. `None` if it does not count.
    pub(super) fn answer(&mut self, question: &Question, login: u64, answer: Answer) -> Option<Vec<Change>> {
        if self.asked != Some(question.number) || question.login != login {
            return None;
        }
        self.asked = None;
        let mut changes = Vec::new();
        if question.is_listing() {
            self.list(answer.sightings, &answer.counts, &mut changes);
            self.loads += 1;
        } else {
            self.events += answer.sightings.len() as u64;
            changes.extend(answer.sightings.into_iter().filter_map(|sighting| self.tables.take(sighting)));
        }
        self.token = Some(Token { text: answer.token, login }).filter(|token| !token.text.is_empty());
        self.complete = self
            .classes
            .iter()
            .all(|class| expected(*class, &answer.counts).is_none_or(|expected| expected == self.tables.count(*class)));
        if !changes.is_empty() {
            self.revision += 1;
        }
        Some(changes)
    }

    fn list(&mut self, sightings: Vec<Sighting>, counts: &BTreeMap<String, i64>, changes: &mut Vec<Change>) {
        let mut seen: HashMap<ObjectClass, HashSet<String>> = HashMap::new();
        for sighting in sightings {
            let of_class = seen.entry(sighting.class()).or_default();
            // Pools also tell in a listing what is long gone, and may tell that after telling that it was there.
            if sighting.exists() {
                of_class.insert(sighting.reference().to_owned());
            } else {
                of_class.remove(sighting.reference());
            }
            changes.extend(self.tables.take(sighting));
        }
        let none = HashSet::new();
        let listed = |class: &ObjectClass| seen.get(class).unwrap_or(&none);
        let whole = |class: &ObjectClass| expected(*class, counts).map(|expected| expected == listed(class).len());
        // Classes that are not counted are believed if all others are whole.
        let others = self.classes.iter().all(|class| whole(class).unwrap_or(true));
        for class in self.classes.clone() {
            if whole(&class).unwrap_or(others) {
                self.tables.keep(class, listed(&class), changes);
            } else {
                tracing::debug!(class = class.name(), "a listing is not whole, nothing is taken for gone");
            }
        }
    }
}

#[cfg(test)]
#[path = "state_model.rs"]
mod model;
