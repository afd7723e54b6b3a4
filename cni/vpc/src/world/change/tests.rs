use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::spec::{DEFAULT, Spec};

const START: Now = Duration::ZERO;
/// Later than any transition that is under way.
const SETTLED: Duration = Duration::from_secs(1);

fn world() -> World {
    World::new(&Spec::parse(DEFAULT).unwrap()).unwrap()
}

fn instance(world: &World, name: &str) -> InstanceId {
    world
        .instances
        .values()
        .find(|instance| instance.name == name)
        .unwrap()
        .id
        .clone()
}

fn plain(subnet: &str) -> NewInterface {
    NewInterface {
        subnet: subnet.into(),
        ..NewInterface::default()
    }
}

fn available(world: &mut World, subnet: &str) -> InterfaceId {
    let id = world.create(plain(subnet), None, START).unwrap();
    world.advance(SETTLED);
    id
}

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code
}

#[test]
fn an_instance_has_as_many_interfaces_as_its_type() {
    let mut world = world();
    let node = instance(&world, "node-a");
    for device in 1..=2 {
        let id = available(&mut world, "subnet-0a");
        world.attach(&id, &node, device, START).unwrap();
    }
    let id = available(&mut world, "subnet-0a");
    let refusal = world.attach(&id, &node, 3, START).unwrap_err();
    assert_eq!(refusal.code, "AttachmentLimitExceeded");
    assert_eq!(
        refusal.message,
        "Interface count 4 exceeds the limit for m5.large"
    );
}

#[test]
fn the_limit_of_an_interface_counts_its_primary_and_its_prefixes() {
    let mut world = world();
    let node = instance(&world, "node-b");
    let id = world.attached_to(&node)[0].0.id.clone();
    let prefixes = Wanted::Any(2);
    world
        .assign(&id, &Wanted::Any(3), &prefixes, false)
        .unwrap();
    let over = world.assign(&id, &Wanted::Any(1), &Wanted::default(), false);
    assert_eq!(code(over), "PrivateIpAddressLimitExceeded");
    assert_eq!(world.ports()[&id].addresses.len(), 4 + 32);
}

#[test]
fn an_overfull_interface_fails_at_attach() {
    let mut world = world();
    let node = instance(&world, "node-b");
    let asked = NewInterface {
        secondary: Wanted::Any(6),
        ..plain("subnet-0b")
    };
    let id = world.create(asked, None, START).unwrap();
    world.advance(SETTLED);
    assert_eq!(
        code(world.attach(&id, &node, 1, START)),
        "InvalidInterface.IpAddressLimitExceeded"
    );
}

#[test]
fn states_pass_through_their_stations() {
    let mut world = world();
    let node = instance(&world, "node-a");
    let id = world.create(plain("subnet-0a"), None, START).unwrap();
    assert_eq!(world.interface(&id).unwrap().status(), "pending");
    assert_eq!(code(world.attach(&id, &node, 1, START)), "IncorrectState");
    world.advance(SETTLED);
    assert_eq!(world.interface(&id).unwrap().status(), "available");
    let attachment = world.attach(&id, &node, 1, SETTLED).unwrap();
    assert!(
        !world.ports().contains_key(&id),
        "plugged in before it is attached"
    );
    assert_eq!(code(world.detach(&attachment, SETTLED)), "IncorrectState");
    world.advance(SETTLED * 2);
    assert_eq!(world.ports()[&id].device, 1);
    assert_eq!(code(world.delete(&id)), "InvalidNetworkInterface.InUse");
    assert_eq!(
        code(world.attach(&id, &node, 2, SETTLED)),
        "InvalidNetworkInterface.InUse"
    );
    world.detach(&attachment, SETTLED * 2).unwrap();
    assert!(
        !world.ports().contains_key(&id),
        "still plugged in while it is detached"
    );
    assert_eq!(code(world.delete(&id)), "InvalidNetworkInterface.InUse");
    world.advance(SETTLED * 3);
    world.delete(&id).unwrap();
    let gone = world.interface(&id).unwrap_err();
    assert_eq!(gone.code, "InvalidNetworkInterfaceID.NotFound");
    assert!(gone.message.contains(&format!("'{id}'")), "{gone}");
    assert_eq!(
        code(world.detach(&attachment, START)),
        "InvalidAttachmentID.NotFound"
    );
}

#[test]
fn the_primary_interface_and_address_stay() {
    let mut world = world();
    let node = instance(&world, "node-a");
    let (interface, attachment) = world.attached_to(&node)[0];
    let (id, attachment, primary) = (
        interface.id.clone(),
        attachment.id.clone(),
        interface.primary(),
    );
    assert_eq!(
        code(world.detach(&attachment, START)),
        "OperationNotPermitted"
    );
    assert_eq!(
        code(world.unassign(&id, &[primary], &[])),
        "InvalidParameterValue"
    );
}

#[test]
fn a_client_token_makes_one_interface() {
    let mut world = world();
    let token = || Some("once".to_owned());
    let first = world.create(plain("subnet-0a"), token(), START).unwrap();
    assert_eq!(
        world.create(plain("subnet-0a"), token(), SETTLED).unwrap(),
        first
    );
    let other = world.create(plain("subnet-0b"), token(), START);
    assert_eq!(code(other), "IdempotentParameterMismatch");
}

#[test]
fn an_exhausted_subnet_says_so_in_each_calls_own_words() {
    let text = DEFAULT.replace("10.0.64.0/18", "10.0.64.0/28");
    let mut world = World::new(&Spec::parse(&text).unwrap()).unwrap();
    let node = instance(&world, "node-b");
    let id = world.attached_to(&node)[0].0.id.clone();
    assert_eq!(
        code(world.assign(&id, &Wanted::default(), &Wanted::Any(1), false)),
        "InsufficientCidrBlocks"
    );
    world
        .assign(&id, &Wanted::Any(5), &Wanted::default(), false)
        .unwrap();
    // Eleven usable, six taken.
    let asked = NewInterface {
        secondary: Wanted::Any(5),
        ..plain("subnet-0b")
    };
    let refusal = world.clone().create(asked, None, START).unwrap_err();
    assert_eq!(refusal.code, "InvalidParameterValue");
    assert_eq!(
        refusal.message,
        "There aren't sufficient free Ipv4 addresses or prefixes"
    );
    for _ in 0..5 {
        world.create(plain("subnet-0b"), None, START).unwrap();
    }
    assert_eq!(
        code(world.create(plain("subnet-0b"), None, START)),
        "InsufficientFreeAddressesInSubnet"
    );
}

#[test]
fn an_address_moves_only_when_reassignment_is_allowed() {
    let mut world = world();
    let (one, two) = (
        available(&mut world, "subnet-0a"),
        available(&mut world, "subnet-0a"),
    );
    let given = world
        .assign(&one, &Wanted::Any(1), &Wanted::default(), false)
        .unwrap();
    let these = Wanted::These(given.single.clone());
    assert_eq!(
        code(
            world
                .clone()
                .assign(&two, &these, &Wanted::default(), false)
        ),
        "InvalidIPAddress.InUse"
    );
    world
        .assign(&two, &these, &Wanted::default(), true)
        .unwrap();
    assert_eq!(world.interface(&one).unwrap().addresses.len(), 1);
    let primary = Wanted::These(vec![world.interface(&one).unwrap().primary()]);
    assert_eq!(
        code(world.assign(&two, &primary, &Wanted::default(), true)),
        "InvalidIPAddress.InUse"
    );
}

#[test]
fn an_interface_of_another_zone_is_not_attached() {
    let mut world = world();
    let node = instance(&world, "node-a");
    let id = available(&mut world, "subnet-0b");
    assert_eq!(
        code(world.attach(&id, &node, 1, START)),
        "InvalidParameterCombination"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Create(bool, usize),
    Attach(usize, usize, u32),
    Detach(usize),
    Delete(usize),
    Assign(usize, usize, usize),
    Unassign(usize, usize),
    Wait,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (any::<bool>(), 0..12usize).prop_map(|(zone, count)| Step::Create(zone, count)),
        (any::<usize>(), 0..3usize, 0..5u32).prop_map(|(e, i, d)| Step::Attach(e, i, d)),
        any::<usize>().prop_map(Step::Detach),
        any::<usize>().prop_map(Step::Delete),
        (any::<usize>(), 0..8usize, 0..3usize).prop_map(|(e, s, p)| Step::Assign(e, s, p)),
        (any::<usize>(), any::<usize>()).prop_map(|(e, a)| Step::Unassign(e, a)),
        Just(Step::Wait),
    ]
}

fn play(world: &mut World, step: Step, now: &mut Now) -> Result<(), Refusal> {
    let nth = |world: &World, n: usize| {
        world
            .interfaces
            .keys()
            .nth(n % world.interfaces.len())
            .cloned()
            .unwrap()
    };
    match step {
        Step::Create(zone, count) => {
            let subnet = if zone { "subnet-0a" } else { "subnet-0b" };
            let asked = NewInterface {
                secondary: Wanted::Any(count),
                ..plain(subnet)
            };
            world.create(asked, None, *now).map(drop)
        }
        Step::Attach(interface, at, device) => {
            let at = world.instances.keys().nth(at).cloned().unwrap();
            world
                .attach(&nth(world, interface), &at, device, *now)
                .map(drop)
        }
        Step::Detach(n) => {
            let id = nth(world, n);
            let attachment = world.interface(&id)?.attachment().map(|a| a.id.clone());
            attachment.map_or(Ok(()), |id| world.detach(&id, *now))
        }
        Step::Delete(n) => world.delete(&nth(world, n)),
        Step::Assign(n, single, prefixes) => world
            .assign(
                &nth(world, n),
                &Wanted::Any(single),
                &Wanted::Any(prefixes),
                false,
            )
            .map(drop),
        Step::Unassign(n, which) => {
            let id = nth(world, n);
            let held = &world.interface(&id)?.addresses;
            let address = held[which % held.len()];
            world.unassign(&id, &[address], &[])
        }
        Step::Wait => {
            *now += SETTLED;
            world.advance(*now);
            Ok(())
        }
    }
}

proptest! {
    /// Whatever is asked in whatever order: no limit is passed and no address is held twice.
    #[test]
    fn limits_hold_and_addresses_are_unique(steps in prop::collection::vec(step(), 1..80)) {
        let mut world = world();
        let mut now = START;
        for step in steps {
            let mut next = world.clone();
            if play(&mut next, step, &mut now).is_ok() {
                world = next;
            }
            let held: Vec<Ipv4Addr> =
                world.interfaces.values().flat_map(Interface::held).collect();
            let unique: std::collections::BTreeSet<_> = held.iter().collect();
            prop_assert_eq!(unique.len(), held.len());
            for instance in world.instances.values() {
                let attached = world.attached_to(&instance.id);
                prop_assert!(attached.len() <= instance.limits.interfaces);
                prop_assert!(attached[0].1.device == 0);
                prop_assert!(attached.windows(2).all(|pair| pair[0].1.device < pair[1].1.device));
                for (interface, _) in attached {
                    prop_assert!(interface.slots() <= instance.limits.ipv4_per_interface);
                }
            }
        }
    }
}
