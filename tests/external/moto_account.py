"""What a moto server holds, as JSON: `python moto_account.py URL REGION`. Needs boto3."""

from __future__ import annotations

import json
import sys
from typing import Any

import boto3


def account(url: str, region: str) -> dict[str, Any]:
    """The network that moto starts with, and the groups and templates that Terraform made."""

    def client(service: str) -> Any:
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    ec2 = client("ec2")
    templates = ec2.describe_launch_templates()["LaunchTemplates"]
    return {
        "vpc": ec2.describe_vpcs()["Vpcs"][0]["VpcId"],
        "image": ec2.describe_images()["Images"][0]["ImageId"],
        "subnets": {s["AvailabilityZone"]: [s["SubnetId"]] for s in ec2.describe_subnets()["Subnets"]},
        "groups": client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"],
        "templates": [
            ec2.describe_launch_template_versions(LaunchTemplateId=template["LaunchTemplateId"])[
                "LaunchTemplateVersions"
            ][0]["LaunchTemplateData"]
            for template in templates
        ],
        "roles": [role["RoleName"] for role in client("iam").list_roles()["Roles"]],
    }


if __name__ == "__main__":
    json.dump(account(*sys.argv[1:]), sys.stdout, default=str)
