//! pg_dump's plain text, taken apart into its entries. With `--verbose` each begins with a comment
//! that names what it is of: `-- TOC entry 3405 (class 2606 OID 16394)`, its dependencies among the
//! entries, name and type (pg_backup_archiver.c, `_printTocEntry`). Pure.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};

/// One object's statements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number in the dump.
    pub id: u32,
    /// Catalog and OID on the dumped server; zero for what is said of something else.
    pub class: u32,
    pub oid: u32,
    /// Numbers of entries.
    pub depends: Vec<u32>,
    pub name: String,
    /// pg_dump's word for it: `TABLE`, `FK CONSTRAINT`, `INDEX ATTACH`.
    pub kind: String,
    pub sql: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dump {
    /// Settings of the session.
    head: String,
    entries: Vec<Entry>,
    /// What ends the script.
    tail: String,
}

/// What may come after the rows.
const LATE: [&str; 11] = [
    "CONSTRAINT",
    "FK CONSTRAINT",
    "CHECK CONSTRAINT",
    "INDEX",
    "INDEX ATTACH",
    "TRIGGER",
    "RULE",
    "POLICY",
    "ROW SECURITY",
    "STATISTICS",
    "DEFAULT ACL",
];

/// Not part of what is copied: cluster-wide work, and what needs a superuser.
const LEFT_OUT: [&str; 5] = [
    "EVENT TRIGGER",
    "PUBLICATION",
    "PUBLICATION TABLE",
    "PUBLICATION TABLES IN SCHEMA",
    "SUBSCRIPTION",
];

const ENTRY: &str = "--\n-- TOC entry ";

impl Dump {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.split(ENTRY);
        let head = parts.next().unwrap_or_default().to_owned();
        let mut entries = parts
            .map(|part| Entry::parse(part).with_context(|| format!("pg_dump's entry {:?}", first_line(part))))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut tail = String::new();
        if let Some(last) = entries.last_mut()
            && let Some(at) = last.sql.rfind("-- Completed on ")
        {
            tail = last.sql.split_off(at);
        }
        Ok(Self { head, entries, tail })
    }

    /// pg_dump does not say which indexes an attachment is about; its statement does. `indexes`: by
    /// name as it stands in SQL, class and OID of the index or of its constraint.
    pub(super) fn resolve_attachments(&mut self, indexes: &BTreeMap<String, (u32, u32)>) {
        let ids: BTreeMap<(u32, u32), u32> = self
            .entries
            .iter()
            .map(|entry| ((entry.class, entry.oid), entry.id))
            .collect();
        for entry in self.entries.iter_mut().filter(|entry| entry.kind == "INDEX ATTACH") {
            let statement = entry.sql.lines().find_map(|line| line.strip_prefix("ALTER INDEX "));
            let names = statement.and_then(|line| line.strip_suffix(';')?.split_once(" ATTACH PARTITION "));
            let Some((parent, part)) = names else { continue };
            let known = [parent, part]
                .into_iter()
                .filter_map(|name| ids.get(indexes.get(name)?));
            entry.depends = known.copied().collect();
        }
    }

    /// What comes before the rows and what after, each in the dump's order. `keys`: constraints
    /// and indexes, by OID, that come before.
    pub(super) fn split(&self, keys: &BTreeSet<u32>) -> (Vec<&Entry>, Vec<&Entry>) {
        let by_id: BTreeMap<u32, &Entry> = self.entries.iter().map(|entry| (entry.id, entry)).collect();
        let wanted = self.entries.iter().filter(|entry| !entry.is_left_out(&by_id));
        wanted.partition(|entry| !entry.is_late(keys, &by_id))
    }

    /// A script of these entries. `plainer`: for a server that does not know all of pg_dump's
    /// settings.
    pub(super) fn script(&self, entries: &[&Entry], plainer: bool) -> String {
        let head = match plainer {
            true => self.head.replace("SET transaction_timeout = 0;\n", ""),
            false => self.head.clone(),
        };
        let tail: String = self
            .tail
            .lines()
            .filter(|line| line.starts_with("\\unrestrict"))
            .collect();
        let statements: String = entries.iter().map(|entry| entry.sql.as_str()).collect();
        // psql takes no commands between these two; what follows is ours.
        format!("{head}{statements}\n{tail}\n")
    }
}

impl Entry {
    /// What follows [`ENTRY`].
    fn parse(text: &str) -> anyhow::Result<Self> {
        let (numbers, mut rest) = text.split_once('\n').context("no end of line")?;
        // `3405 (class 2606 OID 16394)`
        let numbers: Vec<u32> = numbers
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        ensure!(numbers.len() == 3, "no class and OID");
        let mut depends = Vec::new();
        if let Some(listed) = rest.strip_prefix("-- Dependencies: ") {
            let (listed, after) = listed.split_once('\n').context("no end of line")?;
            depends = listed.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            rest = after;
        }
        let (named, sql) = rest.split_once("\n--\n").context("no end of its heading")?;
        let named = named.strip_prefix("-- Name: ").context("no name")?;
        let (name, typed) = named.split_once("; Type: ").context("no type")?;
        let (kind, _) = typed.split_once("; Schema: ").context("no schema")?;
        Ok(Self {
            id: numbers[0],
            class: numbers[1],
            oid: numbers[2],
            depends,
            name: name.to_owned(),
            kind: kind.to_owned(),
            sql: sql.to_owned(),
        })
    }

    fn is_left_out(&self, by_id: &BTreeMap<u32, &Self>) -> bool {
        let ours = self.kind == "TRIGGER" && self.name.contains(" zzz_pgtandem_");
        let of_such = self.is_said_of_others()
            && self
                .depends
                .iter()
                .any(|on| by_id.get(on).is_some_and(|on| on.id < self.id && on.is_left_out(by_id)));
        ours || of_such || LEFT_OUT.contains(&self.kind.as_str())
    }

    /// A comment, an attached index: it comes when what it is about is there.
    fn is_said_of_others(&self) -> bool {
        matches!(self.kind.as_str(), "COMMENT" | "INDEX ATTACH" | "SECURITY LABEL")
    }

    fn is_late(&self, keys: &BTreeSet<u32>, by_id: &BTreeMap<u32, &Self>) -> bool {
        if self.is_said_of_others() {
            let mut others = self.depends.iter().filter_map(|on| by_id.get(on));
            return others.any(|on| !on.is_said_of_others() && on.is_late(keys, by_id));
        }
        match self.kind.as_str() {
            "CONSTRAINT" | "INDEX" => !keys.contains(&self.oid),
            // A view that rests on a key: pg_dump makes it twice, the second time as it is.
            "RULE" => !self.name.ends_with(" _RETURN"),
            kind => LATE.contains(&kind),
        }
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "SET statement_timeout = 0;\nSET transaction_timeout = 0;\n\n\
--\n-- TOC entry 215 (class 1259 OID 100)\n-- Name: t; Type: TABLE; Schema: public; Owner: app\n--\n\nCREATE TABLE public.t (id int);\n\n\
--\n-- TOC entry 300 (class 2606 OID 101)\n-- Dependencies: 215\n-- Name: t t_pkey; Type: CONSTRAINT; Schema: public; Owner: app\n--\n\nALTER TABLE ONLY public.t ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\n\
--\n-- TOC entry 301 (class 1259 OID 102)\n-- Dependencies: 215\n-- Name: i; Type: INDEX; Schema: public; Owner: app\n--\n\nCREATE INDEX i ON public.t (id);\n\n\
--\n-- TOC entry 302 (class 0 OID 0)\n-- Dependencies: 301\n-- Name: INDEX i; Type: COMMENT; Schema: public; Owner: app\n--\n\nCOMMENT ON INDEX public.i IS 'x';\n\n\
--\n-- TOC entry 303 (class 2620 OID 103)\n-- Dependencies: 215\n-- Name: t zzz_pgtandem_row; Type: TRIGGER; Schema: public; Owner: app\n--\n\nCREATE TRIGGER zzz_pgtandem_row;\n\n\
--\n-- TOC entry 304 (class 2618 OID 104)\n-- Dependencies: 300\n-- Name: v _RETURN; Type: RULE; Schema: public; Owner: app\n--\n\nCREATE OR REPLACE VIEW public.v AS SELECT 1;\n\n\
-- Completed on 2026-01-01\n\n--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict x\n";

    #[test]
    fn a_dump_is_split_at_the_rows() {
        let dump = Dump::parse(DUMP).unwrap();
        let (early, late) = dump.split(&BTreeSet::from([101]));
        let ids = |entries: &[&Entry]| entries.iter().map(|entry| entry.id).collect::<Vec<_>>();
        assert_eq!(ids(&early), [215, 300, 304]);
        assert_eq!(ids(&late), [301, 302]);
        let script = dump.script(&early, true);
        assert!(
            script.contains("PRIMARY KEY") && script.ends_with("\\unrestrict x\n"),
            "{script}"
        );
        assert!(
            !script.contains("transaction_timeout") && !script.contains("complete"),
            "{script}"
        );
    }

    #[test]
    fn an_attached_index_comes_with_its_parts() {
        let attached = DUMP.replace(
            "-- Completed on",
            "--\n-- TOC entry 305 (class 0 OID 0)\n-- Name: j; Type: INDEX ATTACH; Schema: public; Owner: app\n--\n\nALTER INDEX public.i ATTACH PARTITION public.\"J\";\n\n-- Completed on",
        );
        let mut dump = Dump::parse(&attached).unwrap();
        dump.resolve_attachments(&BTreeMap::from([("public.i".to_owned(), (1259, 102))]));
        let (_, late) = dump.split(&BTreeSet::from([101]));
        assert!(
            late.iter().any(|entry| entry.id == 305 && entry.depends == [301]),
            "{late:?}"
        );
    }

    #[test]
    fn what_is_not_a_dump_is_refused() {
        assert!(Dump::parse("--\n-- TOC entry x\n").is_err());
    }
}
