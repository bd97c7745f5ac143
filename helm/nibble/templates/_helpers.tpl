{{- define "nibble.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* 46: a StatefulSet's name, `-redis` included, has to leave 11 of a label's 63 characters for its revision. */}}
{{- define "nibble.fullname" -}}
{{- $name := .Values.fullnameOverride }}
{{- if not $name }}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name (include "nibble.name" .)) (contains (include "nibble.name" .) .Release.Name) }}
{{- end }}
{{- $name | trunc 46 | trimSuffix "-" }}
{{- end }}

{{/* Labels that selectors use: they may never change. Takes a dict of root and component. */}}
{{- define "nibble.selector" -}}
app.kubernetes.io/name: {{ include "nibble.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "nibble.labels" -}}
{{ include "nibble.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "nibble.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "nibble.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "nibble.hasBundledRedis" -}}
{{- if not .Values.redis.external.host }}true{{ end }}
{{- end }}

{{- define "nibble.redisHost" -}}
{{- .Values.redis.external.host | default (printf "%s-redis" (include "nibble.fullname" .)) }}
{{- end }}

{{- define "nibble.redisPort" -}}
{{- if .Values.redis.external.host }}{{ .Values.redis.external.port }}{{ else }}6379{{ end }}
{{- end }}

{{- define "nibble.redisDatabase" -}}
{{- if .Values.redis.external.host }}{{ .Values.redis.external.database }}{{ else }}0{{ end }}
{{- end }}

{{/* Workers that may all be gone: requests wait for the first one. */}}
{{- define "nibble.scalesFromZero" -}}
{{- if and .Values.worker.autoscaling.enabled (eq (int .Values.worker.autoscaling.minReplicas) 0) }}true{{ end }}
{{- end }}

{{- define "nibble.passwordEnvironment" -}}
{{- if .Values.redis.auth.existingSecret }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.auth.existingSecret }}
      key: {{ .Values.redis.auth.key }}
{{- end }}
{{- end }}

{{/* What gateways and workers have to agree on. The kubelet puts the password into the URL. */}}
{{- define "nibble.environment" -}}
{{- include "nibble.passwordEnvironment" . | trim | nindent 0 }}
- name: NIBBLE_REDIS_URL
  {{- $scheme := ternary "rediss" "redis" (and (ne .Values.redis.external.host "") .Values.redis.external.tls) }}
  {{- $user := ternary .Values.redis.external.username "" (ne .Values.redis.external.host "") }}
  {{- $login := ternary (printf "%s:$(REDIS_PASSWORD)@" $user) "" (ne .Values.redis.auth.existingSecret "") }}
  value: {{ printf "%s://%s%s:%s/%s" $scheme $login (include "nibble.redisHost" .) (include "nibble.redisPort" .) (include "nibble.redisDatabase" .) | quote }}
- name: NIBBLE_NAMESPACE
  value: {{ .Values.namespace | quote }}
- name: NIBBLE_MODEL_NAME
  value: {{ .Values.model.name | quote }}
- name: NIBBLE_LOG_LEVEL
  value: {{ .Values.logLevel }}
{{- if .Values.tracing.endpoint }}
- name: NIBBLE_TRACING
  value: "true"
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .Values.tracing.endpoint | quote }}
{{- with .Values.tracing.headers.existingSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.tracing.headers.key }}
{{- end }}
{{- include "nibble.settings" .Values.tracing.environment }}
{{- else if or .Values.tracing.environment .Values.tracing.headers.existingSecret }}
{{- fail "tracing.environment and tracing.headers need tracing.endpoint" }}
{{- end }}
{{- end }}

{{/* Of the collector of traces; the URL's own, or its scheme's. */}}
{{- define "nibble.tracingPort" -}}
{{- $url := urlParse .Values.tracing.endpoint }}
{{- $url.host | regexFind ":[0-9]+$" | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{- define "nibble.settings" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "nibble.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "nibble.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod of ours begins with. Takes a dict of root and values (of the component). */}}
{{- define "nibble.podBasics" -}}
serviceAccountName: {{ include "nibble.serviceAccount" .root }}
automountServiceAccountToken: false
# Its variables would begin with NIBBLE_ where a service is called so, and a setting that nobody knows is an error.
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Until a Deployment has failed, and `--wait` of helm 4 with it: the slowest process, and 10 minutes for the model. */}}
{{- define "nibble.progressSeconds" -}}
{{- add 600 (max .Values.gateway.startupSeconds .Values.worker.startupSeconds) }}
{{- end }}

{{/* Fetches and converts the model before the process starts. One of several pods with one volume does so, the others wait. */}}
{{- define "nibble.prepare" -}}
- name: model
  image: {{ .Values.images.gateway }}
  imagePullPolicy: {{ .Values.images.pullPolicy }}
  command: [nibble, prepare, /models/served]
  {{- with .Values.model.source }}
  args: [--model, {{ . | quote }}]
  {{- end }}
  env:
    - name: HF_HOME
      value: /models/hub
    {{- with .Values.model.hubToken.existingSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ . }}
          key: {{ $.Values.model.hubToken.key }}
    {{- end }}
  securityContext:
    {{- include "nibble.containerSecurity" . | nindent 4 }}
  resources:
    {{- toYaml .Values.model.resources | nindent 4 }}
  volumeMounts:
    - name: models
      mountPath: /models
    - name: tmp
      mountPath: /tmp
{{- end }}

{{- define "nibble.volumes" -}}
- name: models
  {{- if .Values.model.volume.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.model.volume.existingClaim }}
  {{- else if eq .Values.model.volume.kind "claim" }}
  persistentVolumeClaim:
    claimName: {{ include "nibble.fullname" . }}-models
  {{- else }}
  emptyDir:
    sizeLimit: {{ .Values.model.volume.size }}
  {{- end }}
- name: tmp
  emptyDir: {}
{{- end }}
