#!/usr/bin/env bash
# Push the two images to Amazon ECR: log in, create the repositories, push, record the digests.
# usage: docker/push.sh TAG FILE        (REGION and ACCOUNT are read from the aws command when not set)
set -euo pipefail

fail() {
  echo "error: $1; $2." >&2
  exit 1
}

[ $# -eq 2 ] || fail "docker/push.sh got $# arguments" "expected TAG and the file to record digests in"
tag=$1
record=$2
for program in docker aws; do
  command -v "$program" >/dev/null || fail "$program: no such program" "install it and log in first"
done

region=${REGION:-$(aws configure get region || true)}
[ -n "$region" ] || fail "no AWS region" "set REGION=us-west-2, or run aws configure"
account=${ACCOUNT:-$(aws sts get-caller-identity --query Account --output text)} ||
  fail "no AWS identity" "log in (aws sso login), or set ACCOUNT="
registry=$account.dkr.ecr.$region.amazonaws.com

for name in distill-teacher distill-student; do
  docker image inspect "$name:$tag" >/dev/null 2>&1 ||
    fail "image $name:$tag does not exist" "run make image-teacher image-student first"
done

# The password goes through a pipe: never into an argument, a file or the history.
aws ecr get-login-password --region "$region" |
  docker login --username AWS --password-stdin "$registry"

digests=()
for name in distill-teacher distill-student; do
  aws ecr describe-repositories --region "$region" --repository-names "$name" >/dev/null 2>&1 ||
    aws ecr create-repository --region "$region" --repository-name "$name" \
      --image-scanning-configuration scanOnPush=true >/dev/null
  docker tag "$name:$tag" "$registry/$name:$tag"
  docker push "$registry/$name:$tag"
  digest=$(aws ecr describe-images --region "$region" --repository-name "$name" \
    --image-ids imageTag="$tag" --query 'imageDetails[0].imageDigest' --output text)
  case $digest in
    sha256:*) ;;
    *) fail "$registry/$name:$tag has no digest ($digest)" "inspect it with aws ecr describe-images" ;;
  esac
  digests+=("$registry/$name@$digest")
done

mkdir -p "$(dirname "$record")"
# Written to a partial file and renamed, so that a reader never sees half of it.
printf '{"distill-teacher": "%s",\n "distill-student": "%s"}\n' "${digests[@]}" >"$record.partial"
mv "$record.partial" "$record"
echo "recorded in $record:"
cat "$record"
