use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
    vec,
};

use futures_util::future::BoxFuture;
use hyper_util::client::legacy::connect::dns::Name;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tower_service::Service;

use super::invalid::InvalidWebhook;

/// Which addresses may be connected to: the public ones, and those that were added.
#[derive(Clone, Default)]
pub(super) struct Allowed {
    networks: Vec<IpNet>,
}

impl Allowed {
    pub(super) fn everything() -> Self {
        Self { networks: vec![IpNet::V4(v4(0, 0, 0, 0, 0)), IpNet::V6(v6(0, 0, 0))] }
    }

    pub(super) fn loopback(&mut self) {
        self.networks.extend([IpNet::V4(LOOPBACK_V4), IpNet::V6(LOOPBACK_V6)]);
    }

    pub(super) fn network(&mut self, text: &str) -> Result<(), InvalidWebhook> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let network = network.ok().filter(|network| network.addr() == network.network());
        self.networks.push(network.ok_or_else(|| InvalidWebhook::Network(text.to_owned()))?);
        Ok(())
    }

    pub(super) fn check(&self, address: IpAddr) -> Result<(), Unreachable> {
        let meant = seen_through(address);
        let added = self.networks.iter().any(|network| network.contains(&address) || network.contains(&meant));
        if added || public(meant) { Ok(()) } else { Err(Unreachable::NotPublic(meant)) }
    }
}

impl fmt::Debug for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entry(&format_args!("public")).entries(self.networks.iter().map(|n| format!("{n}"))).finish()
    }
}

/// Why there is no connection, before any was tried.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreachable {
    #[error("address {0} is not public; allow it with {fix}", fix = fix(.0))]
    NotPublic(IpAddr),
    #[error("the name was not resolved")]
    Unresolved(#[source] io::Error),
}

fn fix(address: &IpAddr) -> String {
    if address.is_loopback() { "`.allow_loopback()`".to_owned() } else { format!("`.allow(\"{address}\")`") }
}

/// Looks names up and keeps only addresses that are allowed. The connection is made to what it returns, so a name that
/// resolves differently a moment later changes nothing.
#[derive(Clone)]
pub(super) struct Resolver(pub(super) Arc<Allowed>);

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = Unreachable;
    type Future = BoxFuture<'static, Result<Self::Response, Unreachable>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Unreachable>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let allowed = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await.map_err(Unreachable::Unresolved)?;
            let mut refused = Unreachable::Unresolved(io::Error::other("it has no address"));
            let mut usable = Vec::new();
            for address in found {
                match allowed.check(address.ip()) {
                    Ok(()) => usable.push(address),
                    Err(error) => refused = error,
                }
            }
            if usable.is_empty() { Err(refused) } else { Ok(usable.into_iter()) }
        })
    }
}

const LOOPBACK_V4: Ipv4Net = v4(127, 0, 0, 0, 8);
const LOOPBACK_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128);

/// What leads to no public host: from IANA's registry of special-purpose addresses (RFC 6890), and one of a cloud.
const SPECIAL_V4: [Ipv4Net; 16] = [
    v4(0, 0, 0, 0, 8),        // this network; Linux connects to itself
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // shared by carriers
    LOOPBACK_V4,              // this machine
    v4(169, 254, 0, 0, 16),   // link-local, and the metadata services of clouds
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // protocol assignments
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 88, 99, 0, 24),   // 6to4 relays
    v4(192, 168, 0, 0, 16),   // private
    v4(198, 18, 0, 0, 15),    // benchmarks
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(224, 0, 0, 0, 4),      // multicast
    v4(240, 0, 0, 0, 4),      // reserved, and broadcast
    v4(168, 63, 129, 16, 32), // the platform service of Azure's machines, on a public address
];

/// All that is routed today; loopback, unique local, link-local and multicast lie outside.
const GLOBAL_V6: Ipv6Net = v6(0x2000, 0, 3);

const SPECIAL_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23),     // protocol assignments, with Teredo
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4, which holds any IPv4 address
    v6(0x3fff, 0, 20),     // documentation
];

/// Where a network without IPv4 reaches it (RFC 6052).
const NAT64: Ipv6Net = v6(0x64, 0xff9b, 96);

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix)
}

fn public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !SPECIAL_V4.iter().any(|network| network.contains(&address)),
        IpAddr::V6(address) => {
            GLOBAL_V6.contains(&address) && !SPECIAL_V6.iter().any(|network| network.contains(&address))
        }
    }
}

/// The address that is really meant: IPv4 also comes mapped into IPv6, or through NAT64.
fn seen_through(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if NAT64.contains(&v6) => {
            let [.., a, b, c, d] = v6.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        canonical => canonical,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(allowed: &Allowed, address: &str) -> bool {
        allowed.check(address.parse().expect(address)).is_ok()
    }

    #[test]
    fn only_public_addresses_are_reached_by_default() {
        let allowed = Allowed::default();
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2001:200::1",
            "2606:4700:4700::1111",
            "2a00:1450:4001::1",
            "::ffff:1.1.1.1",
            "64:ff9b::1.1.1.1",
        ] {
            assert!(check(&allowed, public), "{public} is public");
        }
        for internal in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:0.0.0.0",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0:127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b:1::1.1.1.1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "2002:101:101::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!check(&allowed, internal), "{internal} is not public");
        }
    }

    #[test]
    fn what_was_added_is_reached_and_nothing_else() {
        let mut allowed = Allowed::default();
        allowed.network("10.1.0.0/16").unwrap();
        allowed.network("192.168.0.7").unwrap();
        allowed.network("fd00::/64").unwrap();
        for added in ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "192.168.0.7", "fd00::9", "1.1.1.1"] {
            assert!(check(&allowed, added), "{added} was added");
        }
        for other in ["10.2.0.1", "192.168.0.8", "fd00:0:0:1::1", "127.0.0.1", "::1"] {
            assert!(!check(&allowed, other), "{other} was not added");
        }
        allowed.loopback();
        for loopback in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(check(&allowed, loopback), "{loopback} is loopback");
        }
        assert!(!check(&allowed, "0.0.0.0"));
        let shown = r#"[public, "10.1.0.0/16", "192.168.0.7/32", "fd00::/64", "127.0.0.0/8", "::1/128"]"#;
        assert_eq!(format!("{allowed:?}"), shown);
    }

    #[test]
    fn what_is_not_a_network_is_refused() {
        for refused in ["", "10.0.0.0/33", "10.0.0.7/8", "fd00::1/8", "localhost", "10.0.0.0/8 ", "10/8"] {
            Allowed::default().network(refused).expect_err(refused);
        }
    }

    #[tokio::test]
    async fn a_name_that_resolves_to_an_internal_address_is_refused() {
        let resolve = |allowed: Allowed| Resolver(Arc::new(allowed)).call("localhost".parse().unwrap());
        let error = resolve(Allowed::default()).await.expect_err("localhost is not public");
        let text = error.to_string();
        assert!(text.ends_with(" is not public; allow it with `.allow_loopback()`"), "{text}");
        let mut allowed = Allowed::default();
        allowed.loopback();
        assert!(resolve(allowed).await.unwrap().all(|address| address.ip().is_loopback()));
    }

    proptest! {
        #[test]
        fn any_text_is_a_network_or_refused(
            text in prop_oneof![
                any::<String>(),
                "[0-9a-f:./]{0,45}",
                "[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{1,3}\\.[0-9]{1,3}(/[0-9]{1,3})?",
                any::<(std::net::Ipv6Addr, u8)>().prop_map(|(address, prefix)| format!("{address}/{prefix}")),
                any::<(Ipv4Addr, u8)>().prop_map(|(address, prefix)| format!("{address}/{}", prefix % 40)),
            ],
        ) {
            let mut allowed = Allowed::default();
            if allowed.network(&text).is_ok() {
                let network = allowed.networks[0];
                prop_assert!(allowed.check(network.network()).is_ok() && allowed.check(network.broadcast()).is_ok());
                prop_assert_eq!(network.trunc(), network, "no bits behind the prefix");
                let mut again = Allowed::default();
                prop_assert!(again.network(&network.to_string()).is_ok());
                prop_assert_eq!(again.networks[0], network);
            }
        }

        #[test]
        fn every_form_of_an_address_is_judged_alike(address in any::<u32>(), network in any::<u32>(), prefix in 0..=32_u8) {
            let (address, network) = (Ipv4Addr::from(address), Ipv4Addr::from(network));
            let mut allowed = Allowed::default();
            allowed.networks.push(IpNet::new(network.into(), prefix).unwrap().trunc());
            let judged = allowed.check(address.into()).is_ok();
            let [a, b, c, d] = address.octets().map(u16::from);
            let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d);
            for form in [address.to_ipv6_mapped(), nat64] {
                prop_assert_eq!(allowed.check(form.into()).is_ok(), judged, "{} as {}", address, form);
            }
        }
    }
}
