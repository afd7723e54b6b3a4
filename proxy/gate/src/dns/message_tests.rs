use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{
            A, CNAME, HTTPS,
            opt::{EdnsCode, EdnsOption},
            svcb::{Alpn, EchConfigList, IpHint, Mandatory, SVCB, SvcParamKey, SvcParamValue},
        },
    },
};
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

fn a(owner: &str, ttl: u32, address: [u8; 4]) -> Record {
    Record::from_rdata(
        name(owner),
        ttl,
        RData::A(A::from(std::net::Ipv4Addr::from(address))),
    )
}

fn alias(owner: &str, ttl: u32, target: &str) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(target))))
}

fn answer(question: &Question, id: u16, records: Vec<Record>) -> Vec<u8> {
    let mut message = Message::response(id, OpCode::Query);
    message.add_query(Query::query(
        name(&format!("{}.", question.name)),
        question.kind,
    ));
    message.add_answers(records);
    message.to_vec().unwrap()
}

fn read(question: &Question, records: Vec<Record>) -> Result<Reply, BadReply> {
    question.read_reply(9, &answer(question, 9, records))
}

#[test]
fn nothing_but_the_question_travels_on() {
    let mut query = Message::new(77, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(name("ApI.PaYmEnTs.Example."), RecordType::A));
    query.metadata.checking_disabled = true;
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    edns.options_mut()
        .insert(EdnsOption::Unknown(65001, b"smuggled data".to_vec()));
    query.set_edns(edns);
    query.add_additional(a("more.example.", 1, [1, 2, 3, 4]));
    let question = Question::parse(&query.to_vec().unwrap()).unwrap();
    assert_eq!(question.name, "api.payments.example");

    let sent = question.upstream(5).unwrap();
    assert!(!sent.windows(8).any(|eight| eight == b"smuggled"));
    assert!(
        sent.windows(8).any(|eight| eight == b"payments"),
        "in lower case"
    );
    let sent = Message::from_vec(&sent).unwrap();
    assert_eq!(
        (
            sent.queries.len(),
            sent.answers.len(),
            sent.additionals.len()
        ),
        (1, 0, 0)
    );
    assert!(!sent.metadata.checking_disabled);
    let edns = sent.edns.unwrap();
    assert!(edns.option(EdnsCode::Unknown(65001)).is_none());

    let reply = question.answer(&Reply::failure(Code::Refused));
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!(reply.metadata.id, 77);
    assert_eq!(
        reply.queries[0].name().to_ascii(),
        "ApI.PaYmEnTs.Example.",
        "its case comes back"
    );
}

#[test]
fn what_is_no_question_gets_no_answer_or_an_error() {
    let encode = |message: &Message| message.to_vec().unwrap();
    let ask = |text: &str| Query::query(name(text), RecordType::A);
    let code = |bytes: &[u8]| match Question::parse(bytes) {
        Err(BadQuery::Answer(answer)) => {
            Some(Message::from_vec(&answer).unwrap().metadata.response_code)
        }
        Err(BadQuery::Ignore) => None,
        Ok(question) => panic!("{question:?}"),
    };
    assert_eq!(code(b""), None);
    assert_eq!(code(b"\x00\x01"), None);
    let mut response = Message::response(1, OpCode::Query);
    response.add_query(ask("a.example."));
    assert_eq!(
        code(&encode(&response)),
        None,
        "an answer is never answered"
    );

    let mut two = Message::new(1, MessageType::Query, OpCode::Query);
    two.add_query(ask("a.example."))
        .add_query(ask("b.example."));
    assert_eq!(code(&encode(&two)), Some(ResponseCode::FormErr));
    let none = Message::new(1, MessageType::Query, OpCode::Query);
    assert_eq!(code(&encode(&none)), Some(ResponseCode::FormErr));
    let update = Message::new(1, MessageType::Query, OpCode::Update);
    assert_eq!(code(&encode(&update)), Some(ResponseCode::NotImp));
    let mut stuffed = Message::new(1, MessageType::Query, OpCode::Query);
    stuffed
        .add_query(ask("a.example."))
        .add_answer(a("b.example.", 1, [1, 1, 1, 1]));
    assert_eq!(code(&encode(&stuffed)), Some(ResponseCode::FormErr));
    // A name that points at itself.
    let mut looped = encode(&none);
    looped[5] = 1;
    looped.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1]);
    assert_eq!(code(&looped), Some(ResponseCode::FormErr));
}

#[test]
fn only_records_that_answer_the_question_are_learned() {
    let question = Question::new("api.example.", RecordType::A);
    let reply = read(
        &question,
        vec![
            a("attacker.example.", 60, [203, 0, 113, 99]),
            alias("API.example.", 60, "cdn.example."),
            a("cdn.example.", 20, [203, 0, 113, 1]),
            a("api.example.", 60, [203, 0, 113, 2]),
        ],
    );
    // The name has an address of its own: its alias and what that leads to do not count.
    let addresses = reply.unwrap().addresses();
    assert_eq!(addresses, ["203.0.113.2".parse::<IpAddr>().unwrap()]);

    let chained = vec![
        a("cdn.example.", 20, [203, 0, 113, 1]),
        alias("api.example.", 100, "www.example."),
        alias("www.example.", 90, "cdn.example."),
    ];
    let reply = read(&question, chained).unwrap();
    assert_eq!(reply.chain, ["www.example", "cdn.example"]);
    assert_eq!((reply.addresses().len(), reply.ttl), (1, 20));
    let sent = Message::from_vec(&question.answer(&reply)).unwrap();
    assert_eq!(sent.answers.len(), 3);
    assert_eq!(sent.answers[2].name.to_ascii(), "cdn.example.");
}

#[test]
fn loops_and_endless_chains_end() {
    let question = Question::new("a.example.", RecordType::A);
    let looped = vec![
        alias("a.example.", 1, "b.example."),
        alias("b.example.", 1, "a.example."),
    ];
    assert_eq!(read(&question, looped), Err(BadReply::Loop));
    let inner = vec![
        alias("a.example.", 1, "b.example."),
        alias("b.example.", 1, "c.example."),
        alias("c.example.", 1, "b.example."),
    ];
    assert_eq!(read(&question, inner), Err(BadReply::Loop));
    let flood = (0..10_000).map(|n: u16| a("a.example.", 60, [10, 1, (n >> 8) as u8, n as u8]));
    let reply = read(&question, flood.take(2000).collect()).unwrap();
    assert_eq!(reply.records.len(), MAX_RECORDS);
}

#[test]
fn ttls_are_clamped() {
    let question = Question::new("a.example.", RecordType::A);
    for (ttl, expected) in [(0, MIN_TTL), (60, 60), (u32::MAX, MAX_TTL)] {
        let reply = read(&question, vec![a("a.example.", ttl, [203, 0, 113, 1])]).unwrap();
        assert_eq!(reply.ttl, expected);
    }
    assert_eq!(read(&question, vec![]).unwrap().ttl, MAX_NEGATIVE_TTL);
}

#[test]
fn answers_to_other_questions_are_not_taken() {
    let question = Question::new("a.example.", RecordType::A);
    let record = || vec![a("a.example.", 60, [203, 0, 113, 1])];
    let good = answer(&question, 9, record());
    assert!(question.read_reply(9, &good).is_ok());
    assert_eq!(
        question.read_reply(8, &good),
        Err(BadReply::NotOurs),
        "another id"
    );
    let other = Question::new("b.example.", RecordType::A);
    assert_eq!(
        other.read_reply(9, &good),
        Err(BadReply::NotOurs),
        "another name"
    );
    let other = Question::new("a.example.", RecordType::AAAA);
    assert_eq!(
        other.read_reply(9, &good),
        Err(BadReply::NotOurs),
        "another type"
    );
    let query = question.upstream(9).unwrap();
    assert_eq!(
        question.read_reply(9, &query),
        Err(BadReply::NotOurs),
        "a query"
    );
    let mut cut = good;
    cut[2] |= 0x02;
    assert_eq!(question.read_reply(9, &cut), Err(BadReply::Truncated));
}

#[test]
fn service_bindings_lose_what_leads_around_the_gate() {
    let question = Question::new("a.example.", RecordType::HTTPS);
    let alpn = (
        SvcParamKey::Alpn,
        SvcParamValue::Alpn(Alpn(vec!["h2".into()])),
    );
    let ech = || {
        (
            SvcParamKey::EchConfigList,
            SvcParamValue::EchConfigList(EchConfigList(vec![1, 2, 3])),
        )
    };
    let hint = (
        SvcParamKey::Ipv4Hint,
        SvcParamValue::Ipv4Hint(IpHint(vec![A::from(std::net::Ipv4Addr::new(
            203, 0, 113, 99,
        ))])),
    );
    let record = |params| {
        let svcb = SVCB::new(1, name("."), params);
        vec![Record::from_rdata(
            name("a.example."),
            60,
            RData::HTTPS(HTTPS(svcb)),
        )]
    };
    let reply = read(&question, record(vec![alpn.clone(), hint, ech()])).unwrap();
    let RData::HTTPS(https) = &reply.records[0] else {
        panic!("{reply:?}")
    };
    assert_eq!(https.0.svc_params, std::slice::from_ref(&alpn));
    let mandatory = (
        SvcParamKey::Mandatory,
        SvcParamValue::Mandatory(Mandatory(vec![SvcParamKey::EchConfigList])),
    );
    let reply = read(&question, record(vec![mandatory, alpn, ech()])).unwrap();
    assert_eq!(
        reply.records,
        [],
        "a binding that is nothing without its key"
    );
}

#[test]
fn a_long_answer_over_udp_is_cut_short_and_says_so() {
    let question = Question::new("a.example.", RecordType::A);
    let records = (0..60)
        .map(|n| a("a.example.", 60, [203, 0, 113, n]))
        .collect();
    let reply = read(&question, records).unwrap();
    let short = question.answer_udp(&reply);
    assert!(short.len() <= 512);
    let short = Message::from_vec(&short).unwrap();
    assert!(short.metadata.truncation && short.answers.is_empty());
    let whole = Message::from_vec(&question.answer(&reply)).unwrap();
    assert_eq!(whole.answers.len(), 60);
}

#[test]
fn addresses_are_read_backwards_only_when_whole() {
    let reversed = |name| Question::new(name, RecordType::PTR).reversed_address();
    assert_eq!(
        reversed("5.1.0.10.in-addr.arpa."),
        Some("10.0.1.5".parse().unwrap())
    );
    assert_eq!(reversed("1.0.10.in-addr.arpa."), None);
    assert_eq!(reversed("secret.data.in-addr.arpa."), None);
}

proptest! {
    #[test]
    fn hostile_bytes_have_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = Question::parse(&bytes);
        let _ = Question::new("a.example.", RecordType::A).read_reply(9, &bytes);
    }

    #[test]
    fn a_flipped_answer_is_taken_or_not_but_never_for_another_name(
        at in any::<usize>(), flip in 1u8..,
    ) {
        let question = Question::new("a.example.", RecordType::A);
        let records = vec![
            alias("a.example.", 60, "b.example."),
            a("b.example.", 60, [203, 0, 113, 1]),
        ];
        let mut bytes = answer(&question, 9, records);
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(reply) = question.read_reply(9, &bytes) {
            prop_assert!(reply.records.len() <= 1);
            let sent = question.answer(&reply);
            prop_assert!(Message::from_vec(&sent).is_ok());
        }
    }
}
