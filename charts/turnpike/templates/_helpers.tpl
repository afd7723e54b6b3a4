{{/* What must hold before anything is installed. Each file of objects asks first, since templates are
run in no certain order. */}}
{{- define "turnpike.check" -}}
{{- if ne .Release.Namespace "turnpike-system" -}}
{{- fail (printf "Turnpike lives in the namespace turnpike-system, whose name is on the controller's certificate; it cannot be installed into `%s`. Add: --namespace turnpike-system --create-namespace" .Release.Namespace) -}}
{{- end -}}
{{- $enforced := dig "metadata" "labels" "pod-security.kubernetes.io/enforce" "" (lookup "v1" "Namespace" "" "turnpike-system") -}}
{{- if has $enforced (list "baseline" "restricted") -}}
{{- fail (printf "the namespace turnpike-system enforces Pod Security `%s`, under which the node's daemons cannot start. Type: kubectl label namespace turnpike-system --overwrite pod-security.kubernetes.io/enforce=privileged" $enforced) -}}
{{- end -}}
{{- if not .Values.mesh.prefixes -}}
{{- fail "mesh.prefixes: name the ranges of pods and Services, such as --set 'mesh.prefixes={10.0.0.0/16,172.20.0.0/16}': the VPC's range and the Services'" -}}
{{- end -}}
{{- end }}

{{/* An image's full name: (list . "controller"). */}}
{{- define "turnpike.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- $tag := $image.tag | default $root.Values.image.tag | default $root.Chart.AppVersion -}}
{{- with $root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}:{{ $tag }}
{{- end }}

{{- define "turnpike.selector" -}}
app.kubernetes.io/name: turnpike
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* Labels of everything that belongs to a component: (list . "controller"). */}}
{{- define "turnpike.labels" -}}
{{- $root := index . 0 -}}
{{ include "turnpike.selector" (index . 1) }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
{{- end }}

{{/* Environment from a map. A number from YAML is a float: a large one would be written as 1e+09. */}}
{{- define "turnpike.env" -}}
{{- range $name, $value := . -}}
- name: {{ $name }}
  value: {{ ternary (printf "%.0f" $value) (toString $value) (and (kindIs "float64" $value) (eq (toString (floor $value)) (toString $value))) | quote }}
{{ end }}
{{- end }}

{{/* Of every container: log lines for `kubectl logs`, not for a terminal. */}}
{{- define "turnpike.log.env" -}}
- name: NO_COLOR
  value: "1"
{{- end }}

{{/* What identity at the CA needs: a token for it, and the mesh's roots. */}}
{{- define "turnpike.identity.env" -}}
- name: TURNPIKE_TOKEN_FILE
  value: /var/run/secrets/turnpike/token/token
- name: TURNPIKE_ROOT_FILE
  value: /var/run/secrets/turnpike/root/root.pem
{{- end }}

{{- define "turnpike.identity.mounts" -}}
- {name: token, mountPath: /var/run/secrets/turnpike/token, readOnly: true}
- {name: root, mountPath: /var/run/secrets/turnpike/root, readOnly: true}
{{- end }}

{{- define "turnpike.identity.token" -}}
- name: token
  projected:
    sources:
    - serviceAccountToken: {audience: istio-ca, expirationSeconds: 3600, path: token}
{{- end }}

{{/* Security of a container that needs nothing of its node. */}}
{{- define "turnpike.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Nodes whose pods' network is ours to make. */}}
{{- define "turnpike.affinity" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
    - matchExpressions:
      - {key: kubernetes.io/os, operator: In, values: [linux]}
      - {key: eks.amazonaws.com/compute-type, operator: NotIn, values: [fargate, auto, hybrid]}
{{- end }}

{{- define "turnpike.serviceCidrs" -}}
{{- $given := .Values.mesh.serviceCidrs -}}
{{- if not $given -}}
{{- range (lookup "networking.k8s.io/v1" "ServiceCIDR" "" "").items -}}
{{- $given = concat $given .spec.cidrs -}}
{{- end -}}
{{- end -}}
{{- if not $given -}}
{{- fail "mesh.serviceCidrs: the Services' range is needed, and this cluster has no ServiceCIDR objects to read it from (or is not asked, as by `helm template`); on EKS: aws eks describe-cluster --name NAME --query cluster.kubernetesNetworkConfig.serviceIpv4Cidr" -}}
{{- end -}}
{{- $given | uniq | toJson -}}
{{- end }}

{{- define "turnpike.clusterDns" -}}
{{- $given := .Values.gate.clusterDns -}}
{{- if not $given -}}
{{- $given = dig "spec" "clusterIP" "" (lookup "v1" "Service" "kube-system" "kube-dns") -}}
{{- end -}}
{{- if not $given -}}
{{- fail "gate.clusterDns: the address of the cluster's DNS is needed, and there is no Service kube-system/kube-dns to read it from (or the cluster is not asked, as by `helm template`); it is the `nameserver` in any pod's /etc/resolv.conf" -}}
{{- end -}}
{{- $given -}}
{{- end }}
