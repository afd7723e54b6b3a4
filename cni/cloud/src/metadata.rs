//! Who this machine is: IMDSv2, by the SDK's client.

use std::{net::Ipv4Addr, str::FromStr};

use aws_config::imds::Client;
use ipnet::Ipv4Net;

use crate::{CloudError, Instance};

pub(crate) async fn instance(imds: &Client) -> Result<Instance, CloudError> {
    let mac = text(imds, "mac").await?.to_ascii_lowercase();
    let interface = format!("network/interfaces/macs/{mac}");
    let of_interface = |key: &str| format!("{interface}/{key}");
    Ok(Instance {
        id: text(imds, "instance-id").await?,
        instance_type: text(imds, "instance-type").await?,
        zone: text(imds, "placement/availability-zone").await?,
        vpc: text(imds, &of_interface("vpc-id")).await?,
        vpc_cidrs: list(imds, &of_interface("vpc-ipv4-cidr-blocks")).await?,
        interface: text(imds, &of_interface("interface-id")).await?,
        subnet: text(imds, &of_interface("subnet-id")).await?,
        subnet_cidr: parsed(imds, &of_interface("subnet-ipv4-cidr-block")).await?,
        address: parsed::<Ipv4Addr>(imds, "local-ipv4").await?,
        mac,
    })
}

async fn text(imds: &Client, key: &str) -> Result<String, CloudError> {
    let path = format!("/latest/meta-data/{key}");
    match imds.get(path.clone()).await {
        Ok(value) => Ok(value.as_ref().trim().to_owned()),
        Err(error) => {
            let reason = crate::error::reasons(&error);
            Err(CloudError::Metadata { path, reason })
        }
    }
}

async fn parsed<T: FromStr>(imds: &Client, key: &str) -> Result<T, CloudError> {
    parse(key, &text(imds, key).await?)
}

async fn list(imds: &Client, key: &str) -> Result<Vec<Ipv4Net>, CloudError> {
    let text = text(imds, key).await?;
    text.split_ascii_whitespace()
        .map(|item| parse(key, item))
        .collect()
}

fn parse<T: FromStr>(key: &str, text: &str) -> Result<T, CloudError> {
    text.parse().map_err(|_| CloudError::Metadata {
        path: format!("/latest/meta-data/{key}"),
        reason: format!(
            "`{}` is not what is expected there",
            text.chars().take(64).collect::<String>()
        ),
    })
}
